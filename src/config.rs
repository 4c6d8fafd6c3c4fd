//! Settings from the environment: all of them read once, all mistakes in their syntax reported at once. What can be
//! mended while the process runs (no token yet, the placeholder cluster name) is kept, and reads say how to mend it.

use crate::prelude::*;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::{env, path::PathBuf};
use ureq::http::{HeaderValue, Uri};

const TOKEN: &str = "SDC_TOKEN";
const ENDPOINT: &str = "https://HOST[:PORT][/PATH], as https://app.sysdigcloud.com (http:// for this machine only)";
const ADDRESS: &str = "an address with a port, such as [::]:10250";
const CLUSTER: &str = "the cluster's name as Sysdig Monitor shows it, without quotes or backslashes";
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Text that is never shown: it has no `Display`, and its `Debug` hides it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret(HeaderValue);

impl Secret {
    /// Keeps `text` from being shown. None if it could not stand in an HTTP header.
    pub fn new(text: &str) -> Option<Self> {
        let mut value = HeaderValue::from_str(&checked(usize::MAX, |c| c.is_ascii_graphic())(text)?).ok()?;
        value.set_sensitive(true);
        Some(Self(value))
    }

    pub fn expose(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

/// Makes [`Config`] out of its fields, each with its type and how it is read.
macro_rules! settings {
    ($env:ident: $($(#[$doc:meta])* $field:ident: $kind:ty = $read:expr;)+) => {
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Config { $($(#[$doc])* pub $field: $kind,)+ }

        impl Config {
            /// Reads the settings. Errors: one line for each mistake, naming the variable and what would be right.
            pub fn read(variable: impl Fn(&str) -> Option<Result<String, String>>) -> Result<Self, Vec<String>> {
                let mut $env = Reader { variable: &variable, mistakes: Vec::new() };
                let config = Self { $($field: $read,)+ };
                if $env.mistakes.is_empty() { Ok(config) } else { Err($env.mistakes) }
            }
        }
    };
}

settings! { env:
    /// Without `/api` and without trailing slash.
    endpoint: String = env.parse("SDC_ENDPOINT", ENDPOINT, endpoint).unwrap_or_else(|| "https://app.sysdigcloud.com".to_owned());
    /// Read anew for every query; it wins.
    token_file: Option<PathBuf> = env.path("SDC_TOKEN_FILE");
    token: Option<Secret> = env.parse(TOKEN, "without blanks, control and non-ASCII characters", Secret::new);
    /// As Sysdig Monitor shows it; None while it is the placeholder or empty. Filters that it goes into know no escapes.
    cluster: Option<String> = env.parse("CLUSTER_NAME", CLUSTER, checked(253, |c| !c.is_control() && !"'\"\\".contains(c)))
        .filter(|name| name != "YourClusterName");
    /// With `auto` the metric decides.
    backend: &'static str = env.one_of("SDC_BACKEND", &["auto", "data", "promql"]);
    sysdig_ca_file: Option<PathBuf> = env.path("SDC_CA_FILE");
    insecure_skip_verify: bool = env.one_of("SDC_INSECURE_SKIP_VERIFY", &["false", "true"]) == "true";
    /// For one query, from name resolution to the last byte.
    sysdig_timeout: Duration = env.ranged("SDC_TIMEOUT", ["100ms", "30s", "5s"], duration);
    /// Queries under way at the same time.
    max_concurrent: usize = env.ranged("SDC_MAX_CONCURRENT", ["1", "64", "4"], |it| it.parse().ok());
    max_queries: u64 = env.ranged("SDC_MAX_QUERIES_PER_MINUTE", ["10", "1000000", "1000000"], |it| it.parse().ok());
    /// The shortest one still holds a whole window of samples.
    max_age: Duration = env.ranged("MAX_AGE", ["60s", "1h", "120s"], duration);
    /// How often what is asked for is asked anew; zero asks for every read, and remembers nothing.
    refresh_interval: Duration = env.ranged("REFRESH_INTERVAL", ["0s", "1m", "10s"], duration);
    definitions: Option<PathBuf> = env.path("CONFIG_FILE");
    external: bool = env.one_of("EXTERNAL_METRICS", &["false", "true"]) == "true";
    /// None means `[::]:10250`, or `0.0.0.0:10250` without IPv6.
    listen: Option<SocketAddr> = env.parse("LISTEN_ADDR", ADDRESS, |it| it.parse().ok());
    /// Where the adapter's own metrics are served to anybody.
    metrics: Option<SocketAddr> = env.parse("METRICS_ADDR", ADDRESS, |it| it.parse().ok());
    tls_files: Option<(PathBuf, PathBuf)> = {
        let (chain, key) = (env.path("TLS_CERT_FILE"), env.path("TLS_KEY_FILE"));
        let alone = chain.is_some() != key.is_some();
        env.mistakes.extend(alone.then(|| "TLS_CERT_FILE and TLS_KEY_FILE must be set together".to_owned()));
        chain.zip(key)
    };
    tls13_only: bool = env.one_of("TLS_MIN_VERSION", &["1.2", "1.3"]) == "1.3";
    /// Where a fresh private directory for the inner sockets is made.
    socket_dir: PathBuf = env.path("SOCKET_DIR").unwrap_or_else(env::temp_dir);
    /// An URL; None outside a pod.
    kubernetes: Option<String> = env.parse("KUBERNETES_SERVICE_HOST", "a host name or an address", host).map(|host| {
        let port = env.ranged("KUBERNETES_SERVICE_PORT", ["1", "65535", "443"], |it| it.parse::<u16>().ok());
        format!("https://{host}:{port}")
    });
    service_account_dir: PathBuf = env.path("SERVICE_ACCOUNT_DIR").unwrap_or_else(|| SERVICE_ACCOUNT.into());
    service_name: String = env.parse("SERVICE_NAME", "a Service's name",
        checked(63, |c| matches!(c, 'a'..='z' | '0'..='9' | '-'))).unwrap_or_else(|| "api".to_owned());
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<Result<String, String>>,
    mistakes: Vec<String>,
}

impl Reader<'_> {
    /// What the variable's text means; an empty one counts as not set, as `value: ""` in a manifest means it.
    /// The text is shown when it is not `right`, but for that of a secret.
    fn parse<T>(&mut self, name: &str, right: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = (self.variable)(name)?.map_err(|mistake| self.mistakes.push(format!("{name} {mistake}"))).ok()?;
        let text = Some(text.trim()).filter(|text| !text.is_empty())?;
        let parsed = parse(text);
        let shown = if name == TOKEN { "(hidden)".to_owned() } else { quoted(text) };
        self.mistakes.extend(parsed.is_none().then(|| format!("{name} is {shown}: it must be {right}")));
        parsed
    }

    /// One of the `known` texts, by default the first.
    fn one_of(&mut self, name: &str, known: &[&'static str]) -> &'static str {
        let find = |text: &str| known.iter().copied().find(|it| *it == text);
        self.parse(name, &known.join(" or "), find).or_else(|| known.first().copied()).unwrap_or_default()
    }

    fn ranged<T: Default + PartialOrd>(&mut self, name: &str, [min, max, default]: [&str; 3], read: fn(&str) -> Option<T>) -> T {
        let (range, right) = (read(min)..=read(max), format!("from {min} to {max}"));
        let found = self.parse(name, &right, |text| Some(read(text)).filter(|it| it.is_some() && range.contains(it)));
        found.unwrap_or_else(|| read(default)).unwrap_or_default()
    }

    fn path(&mut self, name: &str) -> Option<PathBuf> {
        self.parse(name, "an absolute path", |text| Some(PathBuf::from(text)).filter(|path| path.is_absolute()))
    }
}

/// Takes text of one to so many bytes that has only `allowed` characters.
fn checked(longest: usize, allowed: impl Fn(char) -> bool) -> impl Fn(&str) -> Option<String> {
    move |text| ((1..=longest).contains(&text.len()) && text.chars().all(&allowed)).then(|| text.to_owned())
}

/// A host for an URL; a bare IPv6 address gets its brackets.
fn host(text: &str) -> Option<String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    bare.parse().map_or_else(|_| checked(253, name)(text), |address: Ipv6Addr| Some(format!("[{address}]")))
}

/// Accepts the endpoint as the old adapter (`https://HOST/api/`) and as Sysdig's SDK (`https://HOST`) want it.
fn endpoint(text: &str) -> Option<String> {
    // Neither a user's name nor a query, a fragment or an escape.
    let uri: Uri = checked(usize::MAX, |c| c.is_ascii_alphanumeric() || "-._~/:[]".contains(c))(text)?.parse().ok()?;
    let (scheme, host) = (uri.scheme_str()?, host(uri.host()?)?);
    let port = uri.port_u16().filter(|port| *port > 0).map_or_else(String::new, |port| format!(":{port}"));
    let path = uri.path().trim_end_matches('/');
    let path = path.strip_suffix("/api").unwrap_or(path).trim_end_matches('/');
    let loopback = ["localhost", "[::1]"].contains(&&*host) || host.parse().is_ok_and(|it: Ipv4Addr| it.is_loopback());
    let fits = scheme == "https" || (scheme == "http" && loopback);
    // What is no port is not seen by `port_u16`, but stands in the authority.
    let whole = uri.authority()?.as_str().len() == uri.host()?.len() + port.len();
    (fits && whole).then(|| format!("{scheme}://{host}{port}{path}"))
}

/// One number with one unit: `500ms`, `5s`, `2m`, `1h`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let (_, millis) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)].into_iter().find(|(it, _)| *it == unit)?;
    number.parse::<u64>().ok()?.checked_mul(millis).map(Duration::from_millis)
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
        assert_eq!((config.token, config.token_file), (None, None));
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
            ("https://app.sysdigcloud.com:", None),
            ("https://app.sysdigcloud.com:99999", None),
            ("https://app.sysdigcloud.com#x", None),
            ("https://[app.sysdigcloud.com]", None),
            ("https:///api/", None),
            ("https://app.sysdigcloud.com//api//", Some("https://app.sysdigcloud.com")),
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
        let config = read(&[("CLUSTER_NAME", "YourClusterName"), ("SDC_TOKEN", ""), ("SDC_ENDPOINT", " ")]).unwrap();
        assert_eq!((config.cluster, config.token), (None, None));
    }

    #[test]
    fn a_token_is_never_shown() {
        let config = read(&[("SDC_TOKEN", "abc-def"), ("SDC_TOKEN_FILE", "/etc/sysdig/access-key")]).unwrap();
        assert_eq!(config.token_file, Some("/etc/sysdig/access-key".into()));
        assert_eq!(config.token, Secret::new("abc-def"));
        assert!(!format!("{config:?}").contains("abc-def"));
    }

    #[test]
    fn an_ipv6_kubernetes_host_gets_brackets() {
        for (host, url) in [("fd00::1", "https://[fd00::1]:443"), ("10.0.0.1", "https://10.0.0.1:443"), ("k", "https://k:443")] {
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
