//! One HTTP/1 request head: read strictly, and written anew for the inner server. Pure.
//! Nothing is passed on but the request line, the headers in `FORWARDED` and, from a front proxy, the identity: there
//! is nothing for two parsers to disagree about. Source: <https://www.rfc-editor.org/rfc/rfc9112>.

use crate::{auth::User, prelude::*, route::percent_decode, route::read_only};
use ureq::http::HeaderName;

/// The headers that mean something to the inner server, in lower case.
const FORWARDED: [&str; 3] = ["accept", "authorization", "if-none-match"];
const MOST_HEADERS: usize = 20_000;

/// Under which names, in lower case, name, uid, groups and extras (whose names begin so) of an identity arrive: of groups
/// and extras all count, else the first that is not empty.
/// Source: <https://kubernetes.io/docs/tasks/extend-kubernetes/configure-aggregation-layer/>.
pub type IdentityHeaders = [Vec<String>; 4];

#[derive(Debug, PartialEq, Eq)]
pub struct Head<'a> {
    method: &'a str,
    target: &'a str,
    headers: Vec<(HeaderName, &'a [u8])>,
    /// Whether the sender wants to send more requests.
    pub keep_alive: bool,
}

impl<'a> Head<'a> {
    /// Reads a complete head. After an error it is not known where the next request would start.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let text = bytes.strip_suffix(b"\r\n\r\n").ok_or_else(|| refusal!(InvalidRequest, "the request head is incomplete"))?;
        // A line that LF alone ends is not split off, and refused for holding a control character.
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r\n").unwrap_or(line));
        let malformed = || refusal!(InvalidRequest, "the request line is malformed");
        let words: Vec<&str> = ascii(lines.next().unwrap_or_default()).ok_or_else(malformed)?.split(' ').collect();
        let &[method, target, version] = words.as_slice() else { return Err(malformed()) };
        let fits = Method::from_bytes(method.as_bytes()).is_ok() && method.len() <= 32 && target.starts_with('/');
        let number = version.strip_prefix("HTTP/").filter(|_| fits).ok_or_else(malformed)?;
        ensure!(["1.0", "1.1"].contains(&number), HttpVersion, "{} is not served: use HTTP/1.1", quoted(version));
        let headers: Option<Vec<_>> = lines.take(MOST_HEADERS + 1).map(header).collect();
        let headers = headers.ok_or_else(|| refusal!(InvalidRequest, "a header line is malformed"))?;
        ensure!(headers.len() <= MOST_HEADERS, HeadTooLarge, "more than {MOST_HEADERS} headers");
        let head = Self { method, target, headers, keep_alive: number == "1.1" };
        Ok(Self { keep_alive: head.check()?, ..head })
    }

    /// The head for the inner server; the identity is passed on for `identity` only, percent-encoded.
    pub fn rebuild(&self, identity: Option<&IdentityHeaders>) -> Vec<u8> {
        let forwarded = FORWARDED.iter().filter_map(|name| {
            let values: Vec<&str> = self.values(name).filter_map(ascii).collect();
            (!values.is_empty()).then(|| format!("{name}: {}\r\n", values.join(", ")))
        });
        let user = identity.map(|identity| format!("X-Remote: {}\r\n", percent_encode(json!(self.user(identity)).to_string())));
        let (method, target, lines) = (self.method, self.target, forwarded.chain(user).collect::<String>());
        format!("{method} {target} HTTP/1.1\r\nHost: adapter\r\nConnection: close\r\n{lines}\r\n").into_bytes()
    }

    /// Whom it names; what is not UTF-8 names nobody.
    fn user(&self, [username, uid, group, extra_prefix]: &IdentityHeaders) -> User {
        let text = |value: &[u8]| String::from_utf8(value.to_vec()).ok();
        let first = |names: &[String]| names.iter().find_map(|name| self.values(name).next().filter(|it| !it.is_empty()));
        let [name, uid] = [username, uid].map(|names| first(names).and_then(text).unwrap_or_default());
        let groups = group.iter().flat_map(|name| self.values(name)).filter(|it| !it.is_empty()).filter_map(text).collect();
        let mut user = User { name, uid, groups, ..User::default() };
        for (name, value) in &self.headers {
            let Some(key) = extra_prefix.iter().find_map(|prefix| name.as_str().strip_prefix(prefix)) else { continue };
            // As at the API server, a key that is no encoding stands for itself.
            let key = percent_decode(key).unwrap_or_else(|| key.to_owned());
            user.extra.entry(key).or_default().extend(text(value));
        }
        user
    }

    fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| *value)
    }

    /// Whether the connection is kept, if the headers say what is served.
    fn check(&self) -> Result<bool, Error> {
        let has = |name: &str| self.values(name).next().is_some();
        let options = || self.values("connection").flat_map(|value| value.split(|&byte| byte == b','));
        let asks = |option: &str| options().any(|it| it.trim_ascii().eq_ignore_ascii_case(option.as_bytes()));
        let hosts = self.values("host").count();
        let body = has("transfer-encoding") || self.values("content-length").any(|value| value != b"0");
        let why = match self.method {
            _ if hosts > 1 || (hosts == 0 && self.keep_alive) => "there must be one Host header",
            "GET" | "HEAD" if body => "a request body (Content-Length, Transfer-Encoding) is not accepted",
            method if body => return Err(read_only(method)),
            _ if asks("upgrade") || has("upgrade") => "Upgrade is not accepted: use plain HTTP/1.1 over TLS",
            _ => return Ok(self.keep_alive && !asks("close")),
        };
        Err(refusal!(InvalidRequest, "{why}"))
    }
}

/// Name and trimmed value, which may be UTF-8, as Go sends user names.
fn header(line: &[u8]) -> Option<(HeaderName, &[u8])> {
    let mut parts = line.splitn(2, |&byte| byte == b':');
    let (name, value) = (HeaderName::from_bytes(parts.next()?).ok()?, parts.next()?);
    let fits = !value.iter().any(|&byte| byte.is_ascii_control() && byte != b'\t');
    fits.then_some((name, value.trim_ascii()))
}

fn ascii(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    fn kubernetes() -> IdentityHeaders {
        ["user", "uid", "group", "extra-"].map(|name| vec![format!("x-remote-{name}")])
    }

    fn rebuilt(head: &str, identity: Option<&IdentityHeaders>) -> String {
        String::from_utf8(Head::parse(head.as_bytes()).unwrap().rebuild(identity)).unwrap()
    }

    /// Whom a rebuilt head names.
    fn named(head: &str) -> User {
        assert!(head.is_ascii(), "{head}");
        let line = head.split("\r\n").find_map(|line| line.strip_prefix("X-Remote: ")).expect("the identity");
        serde_json::from_str(&percent_decode(line).unwrap()).unwrap()
    }

    #[test]
    fn only_what_the_inner_server_needs_is_passed_on() {
        let head = "GET /apis?x=1 HTTP/1.1\r\nHost: a\r\nUser-Agent: x\r\nAccept: a/b\r\nTE: trailers\r\nExpect: 100-continue\r\n\
                    accept: c/d\r\nX-Remote-User: joe\r\nContent-Length: 0\r\nIf-None-Match: \"é\"\r\n\r\n";
        let start = "GET /apis?x=1 HTTP/1.1\r\nHost: adapter\r\nConnection: close\r\naccept: a/b, c/d\r\n";
        assert_eq!(rebuilt(head, None), format!("{start}\r\n"));
        let joe = r#"{"extra":{},"groups":[],"user":"joe"}"#;
        assert_eq!(rebuilt(head, Some(&kubernetes())), format!("{start}X-Remote: {}\r\n\r\n", percent_encode(joe)));
    }

    #[test]
    fn an_identity_is_passed_on_in_ascii() {
        let head = "GET / HTTP/1.1\r\nHost: a\r\nx-remote-USER: josé\r\nX-Remote-Group: Équipe 100%\r\nX-Remote-Group: b\r\n\
                    X-Remote-Uid: 7\r\nX-Remote-Extra-Authentication.kubernetes.io%2fcredential-Id: JTI=1\r\nX-Remote-User: root\r\n\r\n";
        let extra = BTreeMap::from([("authentication.kubernetes.io/credential-id".to_owned(), vec!["JTI=1".to_owned()])]);
        let [name, uid] = ["josé", "7"].map(str::to_owned);
        let expected = User { name, uid, groups: ["Équipe 100%", "b"].map(str::to_owned).to_vec(), extra };
        assert_eq!(named(&rebuilt(head, Some(&kubernetes()))), expected);
    }

    #[test]
    fn heads_that_could_be_read_in_two_ways_are_refused() {
        let table = [
            ("", Reason::InvalidRequest),
            ("GET /\r\n", Reason::InvalidRequest),
            ("GET / HTTP/1.1", Reason::InvalidRequest),
            ("GET  / HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("GET / HTTP/1.1 \r\nHost: a", Reason::InvalidRequest),
            ("GET\t/ HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("GET /é HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("GET http://a/ HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("OPTIONS * HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("CONNECT a:443 HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("G(T / HTTP/1.1\r\nHost: a", Reason::InvalidRequest),
            ("GET / HTTP/2.0\r\nHost: a", Reason::HttpVersion),
            ("GET / HTTP/1.2\r\nHost: a", Reason::HttpVersion),
            ("PRI * HTTP/2.0", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\n", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost : a", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\n folded", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nno colon", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\n: empty", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\nY: b", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\rb", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\0b", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nÜ: b", Reason::InvalidRequest),
            ("GET / HTTP/1.1\nHost: a", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 5", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +0", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nContent-Length: 0", Reason::InvalidRequest),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5", Reason::MethodNotAllowed),
            ("POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked", Reason::MethodNotAllowed),
            ("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, UPGRADE", Reason::InvalidRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c", Reason::InvalidRequest),
        ];
        for (head, reason) in table {
            let bytes = format!("{head}\r\n\r\n").into_bytes();
            assert_eq!(Head::parse(&bytes).map_err(|e| e.reason), Err(reason), "{head:?}");
        }
        assert_eq!(Head::parse(b"GET / HTTP/1.1\r\nHost: a\r\n").map_err(|e| e.reason), Err(Reason::InvalidRequest));
    }

    #[test]
    fn a_connection_is_kept_as_http_says() {
        let table = [
            ("HTTP/1.1\r\nHost: a", true),
            ("HTTP/1.1\r\nHost: a\r\nConnection: keep-alive", true),
            ("HTTP/1.1\r\nHost: a\r\nConnection: foo, Close", false),
            ("HTTP/1.0\r\nHost: a", false),
            ("HTTP/1.0", false),
        ];
        for (rest, keep_alive) in table {
            let head = format!("GET / {rest}\r\n\r\n");
            assert_eq!(Head::parse(head.as_bytes()).unwrap().keep_alive, keep_alive, "{rest}");
        }
    }

    #[test]
    fn ten_thousand_groups_fit_and_a_flood_does_not() {
        let groups = |n| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X-Remote-Group: g\r\n".repeat(n));
        assert_eq!(named(&rebuilt(&groups(10_000), Some(&kubernetes()))).groups.len(), 10_000);
        assert_eq!(Head::parse(groups(20_001).as_bytes()).map_err(|e| e.reason), Err(Reason::HeadTooLarge));
    }
}
