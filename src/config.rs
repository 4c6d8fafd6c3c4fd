//! Settings from the environment: all of them read once, all mistakes reported at once.
//!
//! What is wrong in its syntax ends the start. What can be mended while the process runs (no token
//! yet, the placeholder cluster name) is kept, and reads say how to mend it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::quoted;

/// The cluster name that the manifests ship with.
pub const PLACEHOLDER_CLUSTER: &str = "YourClusterName";

/// Text that is never shown: it has no `Display`, and its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being shown. None if it could not stand in an HTTP header.
    pub fn new(text: &str) -> Option<Self> {
        let fits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned()))
    }

    /// The text itself, for the one header it is made for.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Where the Sysdig token comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// `SDC_TOKEN_FILE`, read anew for every query.
    File(PathBuf),
    /// `SDC_TOKEN`.
    Given(Secret),
    /// Neither is set.
    Missing,
}

/// All settings. Names in capitals are environment variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `SDC_ENDPOINT` without `/api` and without trailing slash: `https://app.sysdigcloud.com`.
    pub endpoint: String,
    /// `SDC_TOKEN` or `SDC_TOKEN_FILE`.
    pub token: TokenSource,
    /// `CLUSTER_NAME`: the cluster's name in Sysdig Monitor; None while it is the placeholder or empty.
    pub cluster: Option<String>,
    /// `SDC_CA_FILE`: trusted for Sysdig instead of the built-in roots.
    pub sysdig_ca_file: Option<PathBuf>,
    /// `SDC_TIMEOUT`: for one query, from name resolution to the last byte.
    pub sysdig_timeout: Duration,
    /// `SDC_MAX_CONCURRENT`: reads worked on at the same time.
    pub max_concurrent: usize,
    /// `MAX_AGE`: nothing older is served.
    pub max_age: Duration,
    /// `LISTEN_ADDR`; None means `[::]:10250`, or `0.0.0.0:10250` without IPv6.
    pub listen: Option<SocketAddr>,
    /// `TLS_CERT_FILE` and `TLS_KEY_FILE`.
    pub tls_files: Option<(PathBuf, PathBuf)>,
    /// `TLS_MIN_VERSION` is 1.3.
    pub tls13_only: bool,
    /// `SOCKET_DIR`; None means a fresh private directory under `TMPDIR`.
    pub socket_dir: Option<PathBuf>,
    /// `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT` as an URL; None outside a pod.
    pub kubernetes: Option<String>,
    /// `SERVICE_ACCOUNT_DIR`: holds `token`, `ca.crt` and `namespace`.
    pub service_account_dir: PathBuf,
    /// `SERVICE_NAME`: the Service in front of the adapter.
    pub service_name: String,
}

impl Config {
    /// Reads the settings through `variable`, which yields None for what is not set.
    /// Errors: One line for each mistake, naming the variable and what would be right.
    pub fn read(variable: impl Fn(&str) -> Option<Result<String, String>>) -> Result<Self, Vec<String>> {
        let mut reader = Reader { variable: &variable, mistakes: Vec::new() };
        let config = Self {
            endpoint: reader
                .parse("SDC_ENDPOINT", parse_endpoint)
                .unwrap_or_else(|| "https://app.sysdigcloud.com".to_owned()),
            token: reader.token(),
            cluster: reader.parse("CLUSTER_NAME", parse_cluster).filter(|name| name != PLACEHOLDER_CLUSTER),
            sysdig_ca_file: reader.parse("SDC_CA_FILE", parse_path),
            sysdig_timeout: reader.parse("SDC_TIMEOUT", parse_timeout).unwrap_or(Duration::from_secs(5)),
            max_concurrent: reader.parse("SDC_MAX_CONCURRENT", parse_concurrency).unwrap_or(4),
            max_age: reader.parse("MAX_AGE", parse_max_age).unwrap_or(Duration::from_secs(120)),
            listen: reader.parse("LISTEN_ADDR", |text| {
                text.parse().map_err(|_| "an address with a port, such as 0.0.0.0:10250 or [::]:10250".to_owned())
            }),
            tls_files: reader.tls_files(),
            tls13_only: reader.parse("TLS_MIN_VERSION", parse_tls_version).unwrap_or(false),
            socket_dir: reader.parse("SOCKET_DIR", parse_path),
            kubernetes: reader.kubernetes(),
            service_account_dir: reader
                .parse("SERVICE_ACCOUNT_DIR", parse_path)
                .unwrap_or_else(|| PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount")),
            service_name: reader.parse("SERVICE_NAME", parse_service).unwrap_or_else(|| "api".to_owned()),
        };
        if reader.mistakes.is_empty() { Ok(config) } else { Err(reader.mistakes) }
    }
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<Result<String, String>>,
    mistakes: Vec<String>,
}

impl Reader<'_> {
    /// The variable's text; an empty one counts as not set, as `value: ""` in a manifest means it.
    fn text(&mut self, name: &str) -> Option<String> {
        match (self.variable)(name)? {
            Ok(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
            Err(mistake) => {
                self.mistakes.push(format!("{name} {mistake}"));
                None
            }
        }
    }

    /// `parse` yields what would be right as its error; the text itself is shown, so secrets go another way.
    fn parse<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(name)?;
        parse(&text)
            .map_err(|right| {
                self.mistakes.push(format!("{name} is {}: it must be {right}", quoted(&text)));
            })
            .ok()
    }

    fn token(&mut self) -> TokenSource {
        let given = self.text("SDC_TOKEN");
        if let Some(file) = self.parse("SDC_TOKEN_FILE", parse_path) {
            return TokenSource::File(file);
        }
        match given {
            None => TokenSource::Missing,
            Some(text) => Secret::new(&text).map_or_else(
                || {
                    self.mistakes.push("SDC_TOKEN holds blanks, control or non-ASCII characters".to_owned());
                    TokenSource::Missing
                },
                TokenSource::Given,
            ),
        }
    }

    fn tls_files(&mut self) -> Option<(PathBuf, PathBuf)> {
        match (self.parse("TLS_CERT_FILE", parse_path), self.parse("TLS_KEY_FILE", parse_path)) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                self.mistakes.push("TLS_CERT_FILE and TLS_KEY_FILE must be set together".to_owned());
                None
            }
        }
    }

    fn kubernetes(&mut self) -> Option<String> {
        let host = self.parse("KUBERNETES_SERVICE_HOST", parse_host)?;
        let port = self.parse("KUBERNETES_SERVICE_PORT", parse_port).unwrap_or(443);
        Some(format!("https://{host}:{port}"))
    }
}

fn parse_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("an absolute path".to_owned()) }
}

/// A host for an URL; a bare IPv6 address gets its brackets.
fn parse_host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    match bare.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => Ok(format!("[{address}]")),
        Ok(IpAddr::V4(address)) => Ok(address.to_string()),
        Err(_) if is_host_name(text) => Ok(text.to_owned()),
        Err(_) => Err("a host name or an address".to_owned()),
    }
}

fn is_host_name(text: &str) -> bool {
    text.len() <= 253 && !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| "a port from 1 to 65535".to_owned())
}

/// Accepts the endpoint as the old adapter (`https://HOST/api/`) and as Sysdig's SDK (`https://HOST`) want it.
fn parse_endpoint(text: &str) -> Result<String, String> {
    let right = || {
        "https://HOST[:PORT][/PATH], such as https://app.sysdigcloud.com/api/ (http:// only for this machine)"
            .to_owned()
    };
    let (scheme, rest) = text.split_once("://").ok_or_else(right)?;
    let rest = rest.trim_end_matches('/');
    let rest = rest.strip_suffix("/api").unwrap_or(rest).trim_end_matches('/');
    let (authority, path) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(parse_port(port).map_err(|_| right())?)),
        _ => (authority, None),
    };
    let host = parse_host(host).map_err(|_| right())?;
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~/".contains(&b)) {
        return Err(right());
    }
    let bare = host.trim_matches(['[', ']']);
    let loopback = host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "https" && !(scheme == "http" && loopback) {
        return Err(right());
    }
    let port = port.map_or_else(String::new, |port| format!(":{port}"));
    let path = if path.is_empty() { String::new() } else { format!("/{path}") };
    Ok(format!("{scheme}://{host}{port}{path}"))
}

/// A cluster name goes into a filter that knows no escapes.
fn parse_cluster(text: &str) -> Result<String, String> {
    if text.len() <= 253 && !text.chars().any(|c| c.is_control() || matches!(c, '\'' | '"' | '\\')) {
        Ok(text.to_owned())
    } else {
        Err("the cluster's name as Sysdig Monitor shows it, without quotes or backslashes".to_owned())
    }
}

fn parse_service(text: &str) -> Result<String, String> {
    let fits = text.len() <= 63 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if fits { Ok(text.to_owned()) } else { Err("the name of a Kubernetes Service".to_owned()) }
}

fn parse_tls_version(text: &str) -> Result<bool, String> {
    match text {
        "1.2" | "VersionTLS12" => Ok(false),
        "1.3" | "VersionTLS13" => Ok(true),
        _ => Err("1.2 or 1.3".to_owned()),
    }
}

fn parse_concurrency(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "a number from 1 to 64".to_owned())
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .filter(|d| (Duration::from_millis(100)..=Duration::from_secs(30)).contains(d))
        .ok_or_else(|| "a duration from 100ms to 30s".to_owned())
}

/// The shortest age still holds a whole window of samples.
fn parse_max_age(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .filter(|d| (Duration::from_secs(60)..=Duration::from_secs(3600)).contains(d))
        .ok_or_else(|| "a duration from 60s to 1h".to_owned())
}

/// One number with one unit: `500ms`, `5s`, `2m`, `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        Config::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned())))
    }

    #[test]
    fn without_any_variable_the_defaults_stand() {
        let config = read(&[]).unwrap();
        assert_eq!(config.endpoint, "https://app.sysdigcloud.com");
        assert_eq!(config.token, TokenSource::Missing);
        assert_eq!((config.cluster, config.listen, config.kubernetes), (None, None, None));
        assert_eq!((config.sysdig_timeout, config.max_age), (Duration::from_secs(5), Duration::from_secs(120)));
        assert_eq!(config.service_name, "api");
    }

    #[test]
    fn endpoints_are_taken_in_every_form_people_write() {
        let table = [
            ("https://app.sysdigcloud.com/api/", Some("https://app.sysdigcloud.com")),
            ("https://app.sysdigcloud.com/api", Some("https://app.sysdigcloud.com")),
            ("https://app.sysdigcloud.com", Some("https://app.sysdigcloud.com")),
            ("HTTPS://eu1.app.sysdig.com/", Some("https://eu1.app.sysdig.com")),
            ("https://onprem.example:8443/sysdig/api/", Some("https://onprem.example:8443/sysdig")),
            ("https://[fd00::1]:8443/api", Some("https://[fd00::1]:8443")),
            ("http://127.0.0.1:9090", Some("http://127.0.0.1:9090")),
            ("http://localhost:9090/api/", Some("http://localhost:9090")),
            ("http://[::1]:9090", Some("http://[::1]:9090")),
            ("http://app.sysdigcloud.com/api/", None),
            ("http://127.0.0.1.example.com", None),
            ("app.sysdigcloud.com", None),
            ("ftp://app.sysdigcloud.com", None),
            ("https://", None),
            ("https://user:secret@app.sysdigcloud.com", None),
            ("https://app.sysdigcloud.com:0", None),
            ("https://app.sysdigcloud.com:https", None),
            ("https://app.sysdigcloud.com/api?x=1", None),
            ("https://app sysdigcloud.com", None),
        ];
        for (text, expected) in table {
            let endpoint = read(&[("SDC_ENDPOINT", text)]).map(|config| config.endpoint);
            assert_eq!(endpoint.as_ref().ok().map(String::as_str), expected, "{text}: {endpoint:?}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once_and_name_the_variable() {
        let mistakes = read(&[
            ("SDC_ENDPOINT", "nope"),
            ("SDC_TOKEN", "a secret"),
            ("CLUSTER_NAME", "it's"),
            ("SDC_CA_FILE", "relative.pem"),
            ("SDC_TIMEOUT", "5"),
            ("SDC_MAX_CONCURRENT", "0"),
            ("MAX_AGE", "10s"),
            ("LISTEN_ADDR", "10250"),
            ("TLS_CERT_FILE", "/tls.crt"),
            ("TLS_MIN_VERSION", "1.1"),
            ("KUBERNETES_SERVICE_HOST", "a/b"),
            ("SERVICE_NAME", "Api"),
        ])
        .unwrap_err();
        let named: Vec<&str> = mistakes.iter().filter_map(|line| line.split(' ').next()).collect();
        let expected = [
            "SDC_ENDPOINT",
            "SDC_TOKEN",
            "CLUSTER_NAME",
            "SDC_CA_FILE",
            "SDC_TIMEOUT",
            "SDC_MAX_CONCURRENT",
            "MAX_AGE",
            "LISTEN_ADDR",
            "TLS_CERT_FILE",
            "TLS_MIN_VERSION",
            "KUBERNETES_SERVICE_HOST",
            "SERVICE_NAME",
        ];
        assert_eq!(named, expected, "{mistakes:#?}");
        assert!(!format!("{mistakes:?}").contains("a secret"));
    }

    #[test]
    fn what_can_be_mended_later_is_no_mistake() {
        let config = read(&[("CLUSTER_NAME", PLACEHOLDER_CLUSTER), ("SDC_TOKEN", ""), ("SDC_ENDPOINT", " ")]).unwrap();
        assert_eq!((config.cluster, config.token), (None, TokenSource::Missing));
    }

    #[test]
    fn the_token_file_wins_and_a_token_is_never_shown() {
        let config = read(&[("SDC_TOKEN", "abc-def"), ("SDC_TOKEN_FILE", "/etc/sysdig/access-key")]).unwrap();
        assert_eq!(config.token, TokenSource::File("/etc/sysdig/access-key".into()));
        let config = read(&[("SDC_TOKEN", "abc-def")]).unwrap();
        assert_eq!(config.token, TokenSource::Given(Secret::new("abc-def").unwrap()));
        assert!(!format!("{config:?}").contains("abc-def"));
    }

    #[test]
    fn an_ipv6_kubernetes_host_gets_brackets() {
        for (host, url) in
            [("fd00::1", "https://[fd00::1]:443"), ("10.0.0.1", "https://10.0.0.1:443"), ("k", "https://k:443")]
        {
            assert_eq!(read(&[("KUBERNETES_SERVICE_HOST", host)]).unwrap().kubernetes.as_deref(), Some(url));
        }
    }

    #[test]
    fn durations_have_one_number_and_one_unit() {
        for (text, millis) in [("500ms", 500), ("5s", 5_000), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "1.5s", "-1s", "1m30s", "99999999999999999999s", "5 s", "é"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
