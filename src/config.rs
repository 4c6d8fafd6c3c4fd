//! Settings from the environment: all of them read once, all mistakes in their syntax reported at once. What can be
//! mended while the process runs (no token yet, the placeholder cluster name) is kept, and reads say how to mend it.

use crate::error::quoted;
use std::{env, fmt, net::IpAddr, net::SocketAddr, num::NonZeroU16, path::PathBuf, time::Duration};

pub const PLACEHOLDER_CLUSTER: &str = "YourClusterName";

const DEFAULT_ENDPOINT: &str = "https://app.sysdigcloud.com";
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Text that is never shown: it has no `Display`, and its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being shown. None if it could not stand in an HTTP header.
    pub fn new(text: &str) -> Option<Self> {
        Self::header(text).filter(|_| text.bytes().all(|byte| byte.is_ascii_graphic()))
    }

    /// A header's value, which may hold blanks. None if it is empty.
    pub fn header(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// `SDC_TOKEN_FILE`, read anew for every query.
    File(PathBuf),
    Given(Secret),
    Missing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `SDC_ENDPOINT` without `/api` and without trailing slash: `https://app.sysdigcloud.com`.
    pub endpoint: String,
    pub token: TokenSource,
    /// `CLUSTER_NAME`: the cluster's name in Sysdig Monitor; None while it is the placeholder or empty.
    pub cluster: Option<String>,
    /// `SDC_BACKEND`: whether PromQL is asked, or the Data API; None leaves it to the metric.
    pub promql: Option<bool>,
    pub sysdig_ca_file: Option<PathBuf>,
    /// `SDC_TIMEOUT`: for one query, from name resolution to the last byte.
    pub sysdig_timeout: Duration,
    /// `SDC_MAX_CONCURRENT`: reads worked on at the same time.
    pub max_concurrent: usize,
    pub max_age: Duration,
    /// `LISTEN_ADDR`; None means `[::]:10250`, or `0.0.0.0:10250` without IPv6.
    pub listen: Option<SocketAddr>,
    pub tls_files: Option<(PathBuf, PathBuf)>,
    pub tls13_only: bool,
    /// `SOCKET_DIR` or `TMPDIR`: where a fresh private directory for the inner sockets is made.
    pub socket_dir: PathBuf,
    /// `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT` as an URL; None outside a pod.
    pub kubernetes: Option<String>,
    pub service_account_dir: PathBuf,
    pub service_name: String,
}

impl Config {
    /// Reads the settings. Errors: one line for each mistake, naming the variable and what would be right.
    pub fn read(variable: impl Fn(&str) -> Option<Result<String, String>>) -> Result<Self, Vec<String>> {
        const ENDPOINT: &str =
            "https://HOST[:PORT][/PATH], as https://app.sysdigcloud.com/api/ (http:// for this machine only)";
        const CLUSTER: &str = "the cluster's name as Sysdig Monitor shows it, without quotes or backslashes";
        const ADDRESS: &str = "an address with a port, such as 0.0.0.0:10250 or [::]:10250";
        let backends = [("auto", None), ("data", Some(false)), ("promql", Some(true))];
        let tls = [("1.2", false), ("1.3", true)];
        let number = |text: &str| text.parse().ok().filter(|n| (1..=64).contains(n));
        // A filter that the name goes into knows no escapes.
        let cluster = |text: &str| checked(text, 253, |c| !c.is_control() && !['\'', '"', '\\'].contains(&c));
        let service = |text: &str| checked(text, 63, |c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        let mut env = Reader { variable: &variable, mistakes: Vec::new() };
        let config = Self {
            endpoint: env.parse("SDC_ENDPOINT", ENDPOINT, endpoint).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            token: env.token(),
            cluster: env.parse("CLUSTER_NAME", CLUSTER, cluster).filter(|name| name != PLACEHOLDER_CLUSTER),
            promql: env.parse("SDC_BACKEND", "auto, data or promql", |text| named(&backends, text)).flatten(),
            sysdig_ca_file: env.path("SDC_CA_FILE"),
            sysdig_timeout: env.duration("SDC_TIMEOUT", ["100ms", "30s"], "5s"),
            max_concurrent: env.parse("SDC_MAX_CONCURRENT", "a number from 1 to 64", number).unwrap_or(4),
            // The shortest age still holds a whole window of samples.
            max_age: env.duration("MAX_AGE", ["60s", "1h"], "120s"),
            listen: env.parse("LISTEN_ADDR", ADDRESS, |text| text.parse().ok()),
            tls_files: env.tls_files(),
            tls13_only: env.parse("TLS_MIN_VERSION", "1.2 or 1.3", |text| named(&tls, text)).unwrap_or_default(),
            socket_dir: env.path("SOCKET_DIR").unwrap_or_else(env::temp_dir),
            kubernetes: env.kubernetes(),
            service_account_dir: env.path("SERVICE_ACCOUNT_DIR").unwrap_or_else(|| SERVICE_ACCOUNT.into()),
            service_name: env.parse("SERVICE_NAME", "a Service's name", service).unwrap_or_else(|| "api".to_owned()),
        };
        if env.mistakes.is_empty() { Ok(config) } else { Err(env.mistakes) }
    }
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<Result<String, String>>,
    mistakes: Vec<String>,
}

impl Reader<'_> {
    /// The variable's text; an empty one counts as not set, as `value: ""` in a manifest means it.
    fn text(&mut self, name: &str) -> Option<String> {
        let text = (self.variable)(name)?.map_err(|mistake| self.mistakes.push(format!("{name} {mistake}"))).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// The text is shown when it is not `right`, so secrets go another way.
    fn parse<T>(&mut self, name: &str, right: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = self.text(name)?;
        let parsed = parse(&text);
        if parsed.is_none() {
            self.mistakes.push(format!("{name} is {}: it must be {right}", quoted(&text)));
        }
        parsed
    }

    fn duration(&mut self, name: &str, [least, most]: [&str; 2], default: &str) -> Duration {
        let range = duration(least)..=duration(most);
        let right = format!("a duration from {least} to {most}");
        let found = self.parse(name, &right, |text| duration(text).filter(|found| range.contains(&Some(*found))));
        found.or_else(|| duration(default)).unwrap_or_default()
    }

    fn path(&mut self, name: &str) -> Option<PathBuf> {
        self.parse(name, "an absolute path", |text| Some(PathBuf::from(text)).filter(|path| path.is_absolute()))
    }

    fn token(&mut self) -> TokenSource {
        let given = self.text("SDC_TOKEN");
        if let Some(file) = self.path("SDC_TOKEN_FILE") {
            return TokenSource::File(file);
        }
        let token = given.as_deref().and_then(Secret::new);
        if given.is_some() && token.is_none() {
            self.mistakes.push("SDC_TOKEN holds blanks, control or non-ASCII characters".to_owned());
        }
        token.map_or(TokenSource::Missing, TokenSource::Given)
    }

    fn tls_files(&mut self) -> Option<(PathBuf, PathBuf)> {
        let files = (self.path("TLS_CERT_FILE"), self.path("TLS_KEY_FILE"));
        if files.0.is_some() != files.1.is_some() {
            self.mistakes.push("TLS_CERT_FILE and TLS_KEY_FILE must be set together".to_owned());
        }
        files.0.zip(files.1)
    }

    fn kubernetes(&mut self) -> Option<String> {
        let host = self.parse("KUBERNETES_SERVICE_HOST", "a host name or an address", host)?;
        let port = self.parse("KUBERNETES_SERVICE_PORT", "1 to 65535", |it| it.parse::<NonZeroU16>().ok());
        Some(format!("https://{host}:{}", port.map_or(443, NonZeroU16::get)))
    }
}

fn checked(text: &str, longest: usize, allowed: impl Fn(char) -> bool) -> Option<String> {
    (text.len() <= longest && text.chars().all(allowed)).then(|| text.to_owned())
}

/// A host for an URL; a bare IPv6 address gets its brackets.
fn host(text: &str) -> Option<String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    match bare.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => Some(format!("[{address}]")),
        Ok(IpAddr::V4(address)) => Some(address.to_string()),
        Err(_) => checked(text, 253, |c| c.is_ascii_alphanumeric() || "-._".contains(c)).filter(|it| !it.is_empty()),
    }
}

/// Accepts the endpoint as the old adapter (`https://HOST/api/`) and as Sysdig's SDK (`https://HOST`) want it.
fn endpoint(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let rest = rest.trim_end_matches('/');
    let rest = rest.strip_suffix("/api").unwrap_or(rest).trim_end_matches('/');
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let slash = if path.is_empty() { "" } else { "/" };
    let (name, number) = match authority.rsplit_once(':') {
        Some((name, digits)) if !digits.ends_with(']') => (name, format!(":{}", digits.parse::<NonZeroU16>().ok()?)),
        _ => (authority, String::new()),
    };
    let host = host(name)?;
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    let loopback = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    let scheme = scheme.to_ascii_lowercase();
    let fits = scheme == "https" || (scheme == "http" && loopback);
    let path = checked(path, usize::MAX, |c| c.is_ascii_alphanumeric() || "-._~/".contains(c)).filter(|_| fits)?;
    Some(format!("{scheme}://{host}{number}{slash}{path}"))
}

/// One number with one unit: `500ms`, `5s`, `2m`, `1h`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let millis = named(&[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)], unit)?;
    number.parse::<u64>().ok()?.checked_mul(millis).map(Duration::from_millis)
}

/// The value that stands in a table under a name.
fn named<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(it, _)| *it == name).map(|(_, value)| *value)
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
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "1.5s", "-1s", "1m30s", "99999999999999999999s", "5 s", "é"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
