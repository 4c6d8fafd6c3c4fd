//! What hostile clients, a hostile Sysdig and a hostile Kubernetes API get: a clear refusal or a closed connection, soon,
//! and the next request works.

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::http::{HttpServer, Reply, lock};
use support::pki::rustls_server_config;
use support::sysdig::Fault;
use support::{Ca, Client, HPA, HPA_GROUPS, LeafOptions, Response, Setup, Stage, TOKEN, eventually, kubernetes, unix_now};

const API: &str = "/apis/custom.metrics.k8s.io/v1beta1";
const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default";
const METRIC: &str = "net.http.request.count";
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
/// No refusal that needs no waiting takes longer, on a slow machine.
const SOON: Duration = Duration::from_secs(5);

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// Status code, reason word and message of a refusal.
#[track_caller]
fn refusal(response: &Response) -> (u16, String, String) {
    assert!(response.status >= 400, "{} {}", response.status, response.text());
    assert_eq!(response.header("content-type"), Some("application/json"));
    let status = response.json();
    assert_eq!(
        (&status["kind"], &status["status"], &status["code"]),
        (&json!("Status"), &json!("Failure"), &json!(response.status)),
        "{status}"
    );
    let word = status["details"]["causes"][0]["reason"].as_str().unwrap().to_owned();
    let message = status["message"].as_str().unwrap().to_owned();
    assert!(!message.is_empty() && message.len() < 1000 && !message.contains(char::is_control), "{message}");
    (response.status, word, message)
}

fn value(response: &Response) -> Result<String, String> {
    let value = || Some(response.json()["items"][0]["value"].as_str()?.to_owned());
    if response.status == 200 { value().ok_or_else(|| response.text()) } else { Err(response.text()) }
}

// Requests.

/// What a request leads to on its connection.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// A refusal, and the connection goes on.
    Kept(u16, &'static str),
    /// A refusal, and the connection ends.
    Last(u16, &'static str),
    /// Nothing but the end of the connection.
    Closed,
}

struct Case {
    name: String,
    bytes: Vec<u8>,
    /// Over the front proxy's connection, where the message holds that text.
    proxied: (Outcome, &'static str),
    /// Over a connection without certificate.
    direct: Outcome,
}

/// A request that a front proxy would send for the HPA.
fn request(method: &str, target: &str, headers: &str) -> Vec<u8> {
    let groups: String = HPA_GROUPS.iter().map(|group| format!("X-Remote-Group: {group}\r\n")).collect();
    format!("{method} {target} HTTP/1.1\r\nHost: a\r\nX-Remote-User: {HPA}\r\n{groups}{headers}\r\n").into_bytes()
}

/// A request that is understood as HTTP: a peer without certificate learns nothing about it.
fn routed(bytes: Vec<u8>, code: u16, word: &'static str, says: &'static str) -> Case {
    let name = String::from_utf8_lossy(bytes.get(..bytes.len().min(150)).unwrap()).into_owned();
    Case { name, bytes, proxied: (Outcome::Kept(code, word), says), direct: Outcome::Kept(401, "unauthenticated") }
}

fn target(target: &str, code: u16, word: &'static str, says: &'static str) -> Case {
    routed(request("GET", target, ""), code, word, says)
}

/// A head that the door refuses itself, whoever sends it.
fn refused(head: impl AsRef<[u8]>, code: u16, word: &'static str, says: &'static str) -> Case {
    let bytes = head.as_ref().to_vec();
    let name = String::from_utf8_lossy(bytes.get(..bytes.len().min(150)).unwrap()).into_owned();
    Case { name, bytes, proxied: (Outcome::Last(code, word), says), direct: Outcome::Last(code, word) }
}

/// What is sent before the client ends its side.
fn abandoned(bytes: impl AsRef<[u8]>) -> Case {
    let bytes = bytes.as_ref().to_vec();
    let name = format!("abandoned: {:?}", String::from_utf8_lossy(&bytes));
    Case { name, bytes, proxied: (Outcome::Closed, ""), direct: Outcome::Closed }
}

fn paths() -> Vec<Case> {
    let bad = "invalid-request";
    let read = |rest: &str, says: &'static str| target(&format!("{BASE}/{rest}"), 400, bad, says);
    let unknown = |path: &str, says: &'static str| target(path, 404, "not-found", says);
    vec![
        target("/..", 400, bad, ".."),
        target("/../../etc/passwd", 400, bad, ".."),
        read("services/../m", ".."),
        read("services/./m", ". or .."),
        read("services/%2e%2e/m", ".."),
        read("services/%2E%2E%2Fsecrets/m", "../secrets"),
        target("//", 400, bad, "empty segment"),
        target("//apis", 400, bad, "empty segment"),
        target(&format!("{API}//namespaces/default/services/kuard/m"), 400, bad, "empty segment"),
        read("services//m", "empty segment"),
        read("services/kuard//", "empty segment"),
        read("services/kuard/%00", r"\0"),
        read("services/ku%0d%0aX-Remote-User:%20root/m", r"\r\n"),
        read("services/kuard/m%7f", r"\u{7f}"),
        read("services/kuard/%zz", "%zz"),
        read("services/kuard/%2", "%2"),
        read("services/kuard/%", "percent-encoding"),
        read("services/kuard/%ff%fe", "%ff%fe"),
        read("services/kuard/m?a=%zz", "a=%zz"),
        read("services/kuard/m?%c3%28", "%c3%28"),
        read("services/ku%2Fard/m", "ku/ard"),
        unknown("/nope", "/nope"),
        unknown("/api/v1/secrets", "/api/v1/secrets"),
        unknown("/apis/nope.k8s.io", "/apis/nope.k8s.io"),
        unknown("/apis/external.metrics.k8s.io/v1beta1", "external.metrics.k8s.io"),
        unknown("/apis/custom.metrics.k8s.io/v9", "v9"),
        unknown("/apis/custom.metrics.k8s.io/V1BETA1", "V1BETA1"),
        unknown("/openapi/v3/apis/custom.metrics.k8s.io/v9", "v9"),
        target("/healthz/..%00", 400, bad, r"..\0"),
        unknown("/healthz/etcd", "/healthz/etcd"),
        unknown(&format!("{BASE}/widgets/kuard/m"), "widgets"),
        unknown(&format!("{BASE}/services.apps/kuard/m"), "services.apps"),
        unknown(&format!("{BASE}/services/kuard"), "services/kuard"),
        unknown(&format!("{API}/namespaces"), "namespaces"),
        target(&format!("{API}/services/kuard/m"), 400, bad, "namespaces/NAMESPACE/"),
        read("services/kuard/m/more", "namespaces/NAMESPACE/"),
        read("namespaces/default/m", "namespaces/NAME/METRIC"),
        read("services/Kuard/m", "Kuard"),
        read("services/%20/m", r#"" ""#),
        read("services/a'b/m", "a'b"),
        read("services/x'%20or%20kubernetes.cluster.name='other/m", "x' or kubernetes.cluster.name='other"),
        read("services/a%5c/m", r"a\\"),
        read("services/k%C3%BCard/m", "küard"),
        read("services/deployment;/m", "not a Kubernetes name"),
        read("services/;kuard/m", "no workload type"),
        read("services/pod;kuard/m", "no workload type"),
        read("services/deployment;a;b/m", "a;b"),
        read("pods/deployment;kuard/m", "deployment;kuard"),
        read(&format!("services/{}/m", "n".repeat(254)), "nnn"),
        target(&format!("{API}/namespaces/{}/services/kuard/m", "n".repeat(64)), 400, bad, "Kubernetes namespace"),
        target(&format!("{API}/namespaces/a'b/services/kuard/m"), 400, bad, "a'b"),
        target(&format!("{API}/namespaces/a_b/metrics/m"), 400, bad, "a_b"),
    ]
}

fn metrics_and_queries() -> Vec<Case> {
    let metric = |id: &str, says| target(&format!("{BASE}/services/kuard/{id}"), 400, "invalid-request", says);
    vec![
        metric("a%22b", r#"a\"b"#),
        metric("a'b", "a'b"),
        metric("a%60b", "a`b"),
        metric("sum(up)", "sum(up)"),
        metric("up{job=%22x%22}", "up{job="),
        metric("rate(x[5m])%20or%20vector(0)", "rate(x[5m]) or vector(0)"),
        metric("up%0a%23", r"up\n#"),
        metric("m,n", "m,n"),
        metric("m%25", "m%"),
        metric("%E2%80%AEm", "metric id"),
        metric(&"m".repeat(254), "metric id"),
        metric("m?watch=true", "watched"),
        metric("m?watch", "watched"),
        metric("m?labelSelector=app%3Dkuard", "labelSelector"),
        metric("m?metricLabelSelector=a%3Db%27", "position 1"),
        metric("m?metricLabelSelector=a%3Db%2C!!c", "position 5"),
        metric("m?metricLabelSelector=sysdig%2Fwindow%3D1s", "sysdig/window=20s to 10m"),
        target(&format!("{BASE}/pods/*/m?labelSelector=app%3D%3D%3Db"), 400, "invalid-request", "app===b"),
        target(&format!("{BASE}/pods/%2A%2A/m"), 400, "invalid-request", "**"),
        target(&format!("/apis?{}", "a=b&".repeat(2500)), 400, "invalid-request", "8192 bytes"),
        Case {
            direct: Outcome::Last(431, "head-too-large"),
            ..target(&format!("/{}", "a".repeat(100_000)), 400, "invalid-request", "8192 bytes")
        },
        routed(request("GET", "/apis", "Accept: text/html\r\n"), 406, "not-acceptable", "application/json"),
        routed(request("GET", API, "Accept: application/vnd.kubernetes.protobuf\r\n"), 406, "not-acceptable", "application/json"),
        // A user without name is nobody, whatever the groups.
        routed(
            b"GET /apis HTTP/1.1\r\nHost: a\r\nX-Remote-Group: system:masters\r\n\r\n".to_vec(),
            401,
            "unauthenticated",
            "Unauthorized",
        ),
        routed(
            b"GET /apis HTTP/1.1\r\nHost: a\r\nX-Remote-User: \r\nAuthorization: Basic YTpi\r\n\r\n".to_vec(),
            401,
            "unauthenticated",
            "Unauthorized",
        ),
    ]
}

fn methods() -> Vec<Case> {
    let not_allowed = |method: &'static str| {
        routed(request(method, &format!("{BASE}/services/kuard/{METRIC}"), ""), 405, "method-not-allowed", method)
    };
    let mut cases: Vec<Case> =
        ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get", "!"].map(not_allowed).into();
    cases.push(routed(request("DELETE", "/apis", "Content-Length: 0\r\n"), 405, "method-not-allowed", "DELETE"));
    cases.push(routed(request("POST", "/nope", ""), 404, "not-found", "/nope"));
    cases
}

fn bodies() -> Vec<Case> {
    let get = |headers: &str, body: &str| {
        let bytes = [request("GET", "/apis", headers).as_slice(), body.as_bytes()].concat();
        refused(bytes, 400, "invalid-request", "body")
    };
    let post = |headers: &str, body: &str| {
        let bytes = [request("POST", "/apis", headers).as_slice(), body.as_bytes()].concat();
        refused(bytes, 405, "method-not-allowed", "POST")
    };
    let smuggled = "0\r\n\r\nGET /version HTTP/1.1\r\nHost: a\r\n\r\n";
    vec![
        get("Content-Length: 5\r\n", "hello"),
        get("Content-Length: 5\r\n", ""),
        get("Content-Length: -1\r\n", ""),
        get("Content-Length: +0\r\n", ""),
        get("Content-Length: 0, 0\r\n", ""),
        get("Content-Length: 0x0\r\n", ""),
        get("Content-Length: 99999999999999999999\r\n", ""),
        get("Content-Length: 0\r\nContent-Length: 5\r\n", "hello"),
        get("Transfer-Encoding: chunked\r\n", smuggled),
        get("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", smuggled),
        get("Content-Length: 0\r\ntransfer-encoding: identity\r\n", smuggled),
        get("Transfer-Encoding: xchunked\r\n", smuggled),
        get("Expect: 100-continue\r\nContent-Length: 5\r\n", ""),
        post("Content-Length: 5\r\n", "hello"),
        post("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
        post("Content-Length: 43\r\nTransfer-Encoding: chunked\r\n", smuggled),
    ]
}

fn heads() -> Vec<Case> {
    let bad = "invalid-request";
    let line = |line: &str, says| refused(format!("{line}\r\nHost: a\r\n\r\n"), 400, bad, says);
    let header = |header: &[u8]| {
        let head = [b"GET /apis HTTP/1.1\r\nHost: a\r\n", header, b"\r\n\r\n"].concat();
        refused(head, 400, bad, "header line is malformed")
    };
    let version = |version: &str| refused(format!("GET /apis {version}\r\nHost: a\r\n\r\n"), 505, "http-version", "use HTTP/1.1");
    let malformed = "request line is malformed";
    vec![
        refused("GET /\r\n\r\n", 400, bad, malformed),
        refused("\r\n\r\n", 400, bad, malformed),
        refused("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, bad, malformed),
        refused("EHLO example.org\r\n\r\n", 400, bad, malformed),
        refused(b"\x00\x01\x02\x03\r\n\r\n", 400, bad, malformed),
        line("GET  /apis HTTP/1.1", malformed),
        line("GET /apis  HTTP/1.1", malformed),
        line("GET\t/apis\tHTTP/1.1", malformed),
        line(" GET /apis HTTP/1.1", malformed),
        line("GET /apis HTTP/1.1 ", malformed),
        line("GET /ap is HTTP/1.1", malformed),
        line("GET /apis\0 HTTP/1.1", malformed),
        line("GET /é HTTP/1.1", malformed),
        line("GET apis HTTP/1.1", malformed),
        line("GET https://a/apis HTTP/1.1", malformed),
        line("CONNECT a:443 HTTP/1.1", malformed),
        line("OPTIONS * HTTP/1.1", malformed),
        line("G(T /apis HTTP/1.1", malformed),
        line(&format!("{} /apis HTTP/1.1", "M".repeat(33)), malformed),
        line("GET /apis http/1.1", malformed),
        line("GET /apis HTTP/1.1\nX: y", malformed),
        version("HTTP/0.9"),
        version("HTTP/1.2"),
        version("HTTP/2.0"),
        version("HTTP/3"),
        version("HTTP/1.1.1"),
        refused("GET /apis HTTP/1.1\r\n\r\n", 400, bad, "Host"),
        refused("GET /apis HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, bad, "Host"),
        refused("GET /apis HTTP/1.1\r\nHost: a\r\nhOST: a\r\n\r\n", 400, bad, "Host"),
        header(b"X: a\nY: b"),
        header(b"X: a\rb"),
        header(b"X: a\0b"),
        header(b"X: a\x7fb"),
        header(b" folded: yes"),
        header(b"X: a\r\n\tfolded"),
        header(b"X : a"),
        header(b": a"),
        header(b"no colon"),
        header(b"X\0Y: a"),
        header("Ünicode: a".as_bytes()),
        header(b"X\xff: a"),
        refused("GET /apis HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400, bad, "Upgrade"),
        refused("GET /apis HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\n\r\n", 400, bad, "Upgrade"),
        refused("GET /apis HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, uPGRADE\r\n\r\n", 400, bad, "Upgrade"),
        refused(request("GET", "/apis", &"X: y\r\n".repeat(20_001)), 431, "head-too-large", "20000"),
        refused(request("GET", "/apis", &format!("X: {}\r\n", "y".repeat(1 << 20))), 431, "head-too-large", "1048576"),
        refused(vec![b'a'; (1 << 20) + 1], 431, "head-too-large", "1048576"),
        abandoned(""),
        abandoned("G"),
        abandoned("\r\n"),
        abandoned("GET /apis HTTP/1.1"),
        abandoned("GET /apis HTTP/1.1\r\nHost: a\r\n"),
        abandoned("GET /apis HTTP/1.1\r\nHost: a\r\n\r"),
        abandoned("GET /apis HTTP/1.1\nHost: a\n\n"),
        abandoned("\0\0\0\0"),
    ]
}

/// Sends one case, and checks what comes back and what becomes of the connection.
fn play(client: &Client, case: &Case, outcome: Outcome, says: &str) {
    let name = &case.name;
    let started = Instant::now();
    let mut connection = client.connect();
    connection.try_send_raw(&case.bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
    match outcome {
        Outcome::Kept(code, word) | Outcome::Last(code, word) => {
            let response = connection.try_read_response().unwrap_or_else(|error| panic!("{name}: {error}"));
            let (found_code, found_word, message) = refusal(&response);
            assert_eq!((found_code, found_word.as_str()), (code, word), "{name}: {message}");
            assert!(message.contains(says), "{name}: {message}");
            let is_last = matches!(outcome, Outcome::Last(..));
            assert_eq!(response.header("connection") == Some("close"), is_last, "{name}");
            if is_last {
                assert!(connection.closed(), "{name}: the connection stays");
            } else {
                assert_eq!(connection.get("/version").status, 200, "{name}: the same connection");
                let next = connection.get_as(HPA, &HPA_GROUPS, "/apis");
                assert!(matches!(next.status, 200 | 401), "{name}: the same connection");
            }
        }
        Outcome::Closed => {
            connection.finish();
            assert!(connection.closed(), "{name}");
        }
    }
    assert!(started.elapsed() < SOON, "{name}: {:?}", started.elapsed());
}

#[test]
fn hostile_requests_get_a_status_or_a_closed_connection_and_the_next_request_works() {
    let setup = Setup::start(binary);
    let anonymous = Client::new(setup.adapter.port(), None);
    let good = format!("{BASE}/services/kuard/{METRIC}");
    assert_eq!(value(&setup.read(&good)), Ok("50".to_owned()));
    let cases: Vec<Case> = [paths(), metrics_and_queries(), methods(), bodies(), heads()].into_iter().flatten().collect();
    assert!(cases.len() >= 60);
    let (queries, own) = (setup.sysdig.queries().len(), setup.adapter.threads());
    for (index, case) in cases.iter().enumerate() {
        play(&setup.client, case, case.proxied.0, case.proxied.1);
        assert_eq!(value(&setup.read(&good)), Ok("50".to_owned()), "after {}", case.name);
        assert_eq!(setup.sysdig.queries().len(), queries + index + 1, "{} reached Sysdig", case.name);
        play(&anonymous, case, case.direct, "");
        assert_eq!(anonymous.get("/healthz").text(), "ok", "after {}", case.name);
    }
    for (name, bytes) in no_tls() {
        let started = Instant::now();
        assert!(!received_without_tls(setup.adapter.port(), &bytes).windows(5).any(|part| part == b"HTTP/"), "{name}");
        assert!(started.elapsed() < SOON, "{name}: {:?}", started.elapsed());
        assert_eq!(setup.read("/apis").status, 200, "after {name}");
    }
    assert!(setup.sysdig.refusals().is_empty(), "{:?}", setup.sysdig.refusals());
    eventually("the threads of the connections end", SOON, || setup.adapter.threads() <= own);
    assert!(setup.adapter.rss_kib() < 64 * 1024, "{} KiB", setup.adapter.rss_kib());
    assert!(!setup.adapter.log().contains("panicked"), "{}", setup.adapter.log());
}

/// What comes to the TLS port and is no TLS, or no TLS that can be accepted.
fn no_tls() -> Vec<(&'static str, Vec<u8>)> {
    let record = |kind: u8, length: u16, body: &[u8]| {
        let [high, low] = length.to_be_bytes();
        [&[kind, 3, 1, high, low], body].concat()
    };
    vec![
        ("nothing", Vec::new()),
        ("plain HTTP", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        ("a proxy's greeting", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n".to_vec()),
        ("a line of SSH", b"SSH-2.0-OpenSSH_9.7\r\n".to_vec()),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 100_000]),
        ("an SSL 2 hello", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80\x02\x00\x80".to_vec()),
        ("half a record header", vec![22, 3]),
        ("a record that never ends", record(22, 16_000, &[1, 0, 0])),
        ("a record that is too long", record(22, 0xffff, &[1; 0xffff])),
        ("a handshake message that is too long", record(22, 16_384, &[&[1, 0xff, 0xff, 0xff], &[0; 16_380][..]].concat())),
        ("an empty ClientHello", record(22, 4, &[1, 0, 0, 0])),
        ("a garbled ClientHello", record(22, 64, &[&[1, 0, 0, 60], &[0xa5; 60][..]].concat())),
        ("application data first", record(23, 5, b"hello")),
        ("an alert first", record(21, 2, &[2, 40])),
        ("a heartbeat", record(24, 3, &[1, 0x40, 0])),
    ]
}

fn received_without_tls(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // The adapter may have gone already; that is one of the right answers.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut received = Vec::new();
    let ended = stream.read_to_end(&mut received);
    assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "the connection stays");
    received
}

#[test]
fn head_is_refused_without_a_body_that_the_client_does_not_expect() {
    let setup = Setup::start(binary);
    let headers = [("X-Remote-User", HPA)];
    for client in [&setup.client, &Client::new(setup.adapter.port(), None)] {
        let mut connection = client.connect();
        let response = connection.request("HEAD", "/apis", &headers);
        assert!(matches!(response.status, 401 | 405), "{}", response.status);
        assert_eq!(connection.get("/version").status, 200, "the same connection");
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let setup = Setup::start(binary);
    let paths = ["/version", "/nope", "/apis", "/healthz", &format!("{BASE}/services/kuard/{METRIC}"), API, "//"];
    let expected = [200, 404, 200, 200, 200, 200, 400];
    let mut connection = setup.client.connect();
    let rounds: Vec<u8> =
        (0..20).flat_map(|_| paths.iter().flat_map(|path| request("GET", path, "")).collect::<Vec<_>>()).collect();
    connection.send_raw(rounds);
    for round in 0..20 {
        for (path, status) in paths.iter().zip(expected) {
            let response = connection.read_response();
            assert_eq!(response.status, status, "{path} in round {round}: {}", response.text());
            assert!(status != 404 || response.text().contains("/nope"));
        }
    }
    let last = [request("GET", "/version", ""), request("GET", "/apis", "Upgrade: x\r\n"), request("GET", "/apis", "")];
    connection.send_raw(last.concat());
    assert_eq!(connection.read_response().status, 200);
    assert_eq!(connection.read_response().status, 400);
    assert!(connection.closed(), "nothing behind a refused head is read");
    assert_eq!(value(&setup.read(paths[4])), Ok("50".to_owned()));
}

/// The shape of CVE-2018-1002105: a refused Upgrade whose connection stays open for what follows.
#[test]
fn nothing_that_follows_a_refused_upgrade_is_read() {
    let setup = Setup::start(binary);
    for client in [&setup.client, &Client::new(setup.adapter.port(), None)] {
        for separate in [false, true] {
            let queries = setup.sysdig.queries().len();
            let upgrade = request("GET", "/apis", "Connection: Upgrade\r\nUpgrade: websocket\r\n");
            let follows = request("GET", &format!("{BASE}/services/kuard/{METRIC}"), "");
            let mut connection = client.connect();
            if separate {
                connection.send_raw(&upgrade);
                assert_eq!(refusal(&connection.read_response()).1, "invalid-request");
                // The other side may be closed already.
                let _ = connection.try_send_raw(&follows);
            } else {
                connection.send_raw([upgrade, follows].concat());
                assert_eq!(refusal(&connection.read_response()).1, "invalid-request");
            }
            assert!(connection.closed(), "no second answer");
            assert_eq!(setup.sysdig.queries().len(), queries, "nothing further is asked of anyone");
        }
    }
    assert_eq!(setup.read("/apis").status, 200);
}

#[test]
fn an_identity_cannot_be_forged_by_the_spelling_of_its_header() {
    let setup = Setup::start(binary);
    let table = [
        "X_Remote_User: root\r\nX-Remote-Group: system:masters",
        "X-Remote-User\t: root",
        "X-Remote-User:",
        "X-Remote-Extra-User: root",
        "Remote-User: root",
        "Forwarded: for=root",
    ];
    for header in table {
        let mut connection = setup.client.connect();
        connection.send_raw(format!("GET /apis HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n"));
        let code = connection.read_response().status;
        assert!(matches!(code, 400 | 401), "{header}: {code}");
    }
    assert_eq!(setup.kubernetes.counter_of("subjectaccessreviews"), 0, "nobody was asked about");
}

// Sysdig.

/// A body of the Data API; NAME stands for the object and NOW for a fresh time.
fn rows(rows: &str) -> Fault {
    body(&format!(r#"{{"data":[{rows}]}}"#))
}

fn body(text: &str) -> Fault {
    Fault::Body(text.to_owned())
}

/// One row about the right object with that text as its value.
fn cell(text: &str) -> Fault {
    rows(&format!(r#"{{"t":NOW,"d":["default","NAME",{text},3]}}"#))
}

fn time(text: &str) -> Fault {
    rows(&format!(r#"{{"t":{text},"d":["default","NAME",50,3]}}"#))
}

fn columns(text: &str) -> Fault {
    rows(&format!(r#"{{"t":NOW,"d":{text}}}"#))
}

const INVALID: (u16, &str) = (503, "backend-invalid-answer");
const TIMEOUT: (u16, &str) = (503, "backend-timeout");

/// What goes wrong, and the status code and reason word that say so.
fn failures() -> Vec<(Fault, (u16, &'static str))> {
    let status =
        |status: u16, word: &'static str| (Fault::Status(status), (if word == "backend-rejected" { 404 } else { 503 }, word));
    vec![
        (Fault::Garbage, INVALID),
        (Fault::Truncated, INVALID),
        (Fault::Huge, INVALID),
        (Fault::Future(600), INVALID),
        (Fault::Reset, (503, "backend-unreachable")),
        (Fault::Hang, TIMEOUT),
        (Fault::HangInBody, TIMEOUT),
        (Fault::Drip, TIMEOUT),
        (Fault::Hold, TIMEOUT),
        status(201, "backend-error"),
        status(204, "backend-error"),
        status(206, "backend-error"),
        status(301, "backend-rejected"),
        status(307, "backend-rejected"),
        status(400, "backend-rejected"),
        status(401, "backend-unauthorized"),
        status(403, "backend-forbidden"),
        status(404, "backend-rejected"),
        status(422, "backend-rejected"),
        status(429, "backend-rate-limited"),
        status(500, "backend-error"),
        status(502, "backend-error"),
        status(503, "backend-error"),
        status(504, "backend-error"),
        (Fault::StatusWithRetryAfter(429, 2), (503, "backend-rate-limited")),
        (Fault::StatusWithRetryAfter(503, 7), (503, "backend-error")),
    ]
}

/// Answers that are no answers to the question.
fn nonsense() -> Vec<Fault> {
    let deep = "[".repeat(100_000);
    vec![
        body(""),
        body("null"),
        body("true"),
        body("0"),
        body(r#""data""#),
        body("[]"),
        body("{}"),
        body(r#"{"data":null}"#),
        body(r#"{"data":{}}"#),
        body(r#"{"data":0}"#),
        body(&format!(r#"{{"data":"Bearer {TOKEN}"}}"#)),
        body(&format!(r#"{{"data":[{{"t":"{TOKEN}","d":[]}}]}}"#)),
        body(&format!(r#"{{"data":"{}"}}"#, "x".repeat(1 << 20))),
        body(r#"{"data":[1]}"#),
        body(r#"{"data":[{}]}"#),
        body(r#"{"data":[null]}"#),
        body(r#"{"Data":[]}"#),
        body(r#"{"data":[]"#),
        body(r#"{"data":[]}{"data":[]}"#),
        body(r#"{"data":[],"data":[{"t":NOW,"d":["default","NAME",50,3]}]}"#),
        body("\u{feff}{\"data\":[]}"),
        body("{'data':[]}"),
        body(&format!(r#"{{"data":{deep}"#)),
        body(&format!(r#"{{"other":{deep}"#)),
        body(&deep),
        cell(&deep),
        cell(&format!("{deep}{}", "]".repeat(100_000))),
        rows(r#"{"t":NOW}"#),
        rows(r#"{"d":["default","NAME",50,3]}"#),
        rows(r#"{"t":NOW,"t":NOW,"d":["default","NAME",50,3]}"#),
        columns("[]"),
        columns("null"),
        columns("{}"),
        columns(r#"["default","NAME",50]"#),
        columns(r#"["default","NAME",50,3,1]"#),
        columns(r#"[50,3,"default","NAME"]"#),
        columns(r#"[null,"NAME",50,3]"#),
        columns(r#"["default",null,50,3]"#),
        columns(r#"["default","other",50,3]"#),
        columns(r#"["other","NAME",50,3]"#),
        columns(r#"["default",["NAME"],50,3]"#),
        columns(r#"["default","NAME ",50,3]"#),
        cell(r#""50""#),
        cell(r#""NaN""#),
        cell("NaN"),
        cell("Infinity"),
        cell("-Infinity"),
        cell("true"),
        cell("[50]"),
        cell("{}"),
        cell("1e400"),
        cell("-1e400"),
        cell("050"),
        cell("+50"),
        cell("0x32"),
        cell("50."),
        cell("5 0"),
        time("-1"),
        time("1.5e9"),
        time(r#""NOW""#),
        time("null"),
        time("18446744073709551615"),
        time("18446744073709551616"),
        time("NOW000"),
        time("9999999999"),
    ]
}

/// Answers that are understood, and refused for what they say.
fn unfit() -> Vec<(Fault, (u16, &'static str))> {
    let two = r#"{"t":NOW,"d":["default","NAME",50,3]},{"t":NOW,"d":["default","NAME",70,3]}"#;
    vec![
        (Fault::Empty, (404, "no-data")),
        (body(r#"{"data":[]}"#), (404, "no-data")),
        // Which pods there are, the next answer would have to tell.
        (cell("null"), (404, "partly-seen")),
        (rows(two), (422, "ambiguous")),
        (Fault::Stale(150), (503, "too-old")),
        (time("0"), (503, "too-old")),
        (time("1562514927"), (503, "too-old")),
        (cell("1e300"), (422, "out-of-range")),
        (cell("-1e300"), (422, "out-of-range")),
        (cell(&"9".repeat(300)), (422, "out-of-range")),
        (cell("9223372036854775808"), (422, "out-of-range")),
        (cell("-9223372036854775808"), (422, "out-of-range")),
    ]
}

/// A setup for Sysdig's failures; every object is new, so that nothing known from before can help.
struct Account {
    setup: Setup,
    objects: usize,
    /// Threads that the adapter has for itself.
    own: u64,
}

impl Account {
    fn start() -> Self {
        Self::start_with(&[("SDC_TIMEOUT", "1s".to_owned())])
    }

    fn start_with(settings: &[(&str, String)]) -> Self {
        let setup = Setup::start_with(binary, settings);
        let own = setup.adapter.threads();
        Self { setup, objects: 0, own }
    }

    fn object(&mut self) -> String {
        self.objects += 1;
        let name = format!("app-{}", self.objects);
        self.setup.deployment("default", &name, 3, &[(METRIC, 50.0)]);
        name
    }

    fn read(&self, name: &str) -> Response {
        self.setup.read(&format!("{BASE}/services/{name}/{METRIC}"))
    }

    /// How somebody reads about whom nothing is remembered.
    fn reader(&mut self) -> impl Fn(&Self) -> Response + use<> {
        let name = self.object();
        let group = format!("group-{}", self.objects);
        move |account| {
            let groups = [HPA_GROUPS.as_slice(), &[group.as_str()]].concat();
            account.setup.client.get_as(HPA, &groups, &format!("{BASE}/services/{name}/{METRIC}"))
        }
    }

    fn fail(&self, fault: &Fault, name: &str) {
        self.setup.sysdig.fail(match fault {
            Fault::Body(text) => Fault::Body(text.replace("NAME", name).replace("NOW", &(unix_now() - 10).to_string())),
            other => other.clone(),
        });
    }

    /// Reads under a fault, and once more after it.
    fn check(&mut self, fault: &Fault, expected: (u16, &str)) -> Response {
        let name = self.object();
        let shown: String = format!("{fault:?}").chars().take(150).collect();
        self.fail(fault, &name);
        let started = Instant::now();
        let response = self.read(&name);
        assert!(started.elapsed() < Duration::from_secs(4), "{shown}: {:?}", started.elapsed());
        let (code, word, message) = refusal(&response);
        assert_eq!((code, word.as_str()), expected, "{shown}: {message}");
        assert!(!message.contains(TOKEN), "{message}");
        assert!(message.len() < 2000, "{shown}: {} bytes", message.len());
        assert_eq!(response.header("retry-after"), None, "{shown}: client-go would sleep and ask again");
        self.setup.sysdig.heal();
        let works = || value(&self.read(&name)) == Ok("50".to_owned());
        if word == "backend-rate-limited" {
            let asked = self.setup.sysdig.request_count();
            assert!(!works(), "a limit of the rate is waited out, whoever asks");
            assert_eq!(self.setup.sysdig.request_count(), asked, "{shown}");
            eventually("the limit is over", Duration::from_secs(40), works);
        }
        assert!(works(), "after {shown}");
        response
    }

    /// Lines of the log about whether Sysdig works.
    fn lines(&self) -> Vec<String> {
        self.setup.adapter.log().lines().filter(|line| line.contains(" Sysdig: ")).map(str::to_owned).collect()
    }
}

#[test]
fn every_failure_of_sysdig_has_its_word_and_one_line_of_log_and_ends_with_it() {
    let mut account = Account::start();
    for (fault, expected) in failures() {
        let before = account.lines().len();
        let response = account.check(&fault, expected);
        if let Fault::StatusWithRetryAfter(_, seconds) = fault {
            assert_eq!(response.json()["details"]["retryAfterSeconds"], seconds);
        }
        if expected.1 == "backend-rejected" {
            // Of one question, and no state of Sysdig; other autoscalers may read well meanwhile.
            assert_eq!(account.lines().len(), before, "{fault:?}: {:#?}", account.lines());
            continue;
        }
        eventually("the recovery is logged", SOON, || {
            account.lines().last().is_some_and(|line| line.contains("Sysdig: works again (failures: 1)"))
        });
        let lines = account.lines();
        assert_eq!(lines.len(), before + 2, "{fault:?}: {lines:#?}");
        assert!(lines[before].contains(&format!("Sysdig: {}: ", expected.1)), "{fault:?}: {lines:#?}");
    }
    let before = account.lines().len();
    account.setup.sysdig.fail(Fault::Status(500));
    for _ in 0..10 {
        let name = account.object();
        assert_eq!(account.read(&name).status, 503);
    }
    account.setup.sysdig.heal();
    let name = account.object();
    assert_eq!(value(&account.read(&name)), Ok("50".to_owned()));
    account.setup.adapter.wait_log("Sysdig: works again (failures: 10)");
    assert_eq!(account.lines().len(), before + 2, "{:#?}", account.lines());
    bounded(&account);
}

#[test]
fn no_answer_of_sysdig_that_is_not_about_the_question_becomes_a_value() {
    let mut account = Account::start();
    let faults = nonsense();
    assert!(faults.len() >= 40);
    for fault in faults {
        account.check(&fault, INVALID);
    }
    for (fault, expected) in unfit() {
        account.check(&fault, expected);
    }
    bounded(&account);
}

#[test]
fn odd_but_valid_answers_of_sysdig_keep_their_value() {
    let mut account = Account::start();
    let table = [
        (cell("-0"), "0"),
        (cell("0.0"), "0"),
        (cell("-0.0000000004"), "-1n"),
        (cell("5e1"), "50"),
        (cell("50.000"), "50"),
        (cell("123456.789"), "123456789m"),
        (rows("\n\t {\"d\" : [\"default\",\"NAME\", 50 ,3], \"more\": [{}], \"t\" :NOW}"), "50"),
        (body(r#"{"end":1,"data":[{"t":NOW,"d":["d\u0065fault","NAME",50,3]}]}"#), "50"),
    ];
    for (fault, expected) in table {
        let name = account.object();
        account.fail(&fault, &name);
        assert_eq!(value(&account.read(&name)), Ok(expected.to_owned()), "{fault:?}");
    }
}

#[test]
fn what_is_no_http_or_no_text_is_an_invalid_answer_of_sysdig_and_never_shows_the_token() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    let full = |body: &[u8]| Reply::typed(200, "application/json", body);
    let raw = |text: &str| Reply::Raw(text.as_bytes().to_vec());
    let echo = format!("You sent Bearer {TOKEN}, {TOKEN}");
    let table: Vec<(Reply, &[&str])> = vec![
        (full(b"{\"data\":[\"\xff\xfe\"]}"), &["backend-invalid-answer"]),
        (full(b"\xff\xfe{\0}\0"), &["backend-invalid-answer"]),
        (full(b"{\"data\":[]}\0"), &["backend-invalid-answer"]),
        (full(b"\x1f\x8b\x08\x00\x00\x00\x00\x00"), &["backend-invalid-answer"]),
        (raw("SSH-2.0-OpenSSH_9.7\r\n"), &["backend-invalid-answer", "backend-unreachable"]),
        (raw("HTTP/1.1 OK\r\n\r\n"), &["backend-invalid-answer"]),
        (raw("HTTP/9.9 200 OK\r\n\r\n{\"data\":[]}"), &["backend-invalid-answer"]),
        (raw(&format!("{head}Content-Length: -1\r\n\r\n{{}}")), &["backend-invalid-answer"]),
        (raw(&format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n")), &["backend-invalid-answer"]),
        (raw(&format!("{head}Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n{{}}")), &["backend-invalid-answer"]),
        (raw(&format!("{head}X: {}", "y".repeat(1 << 20))), &["backend-invalid-answer", "backend-unreachable"]),
        (raw(&format!("{head}{}", "X: y\r\n".repeat(10_000))), &["backend-invalid-answer", "backend-unreachable"]),
        (raw(&"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000)), &["backend-invalid-answer", "backend-unreachable"]),
        (Reply::text(401, &echo), &["backend-unauthorized"]),
        (Reply::text(500, &echo), &["backend-error"]),
        (Reply::json(400, &json!({ "message": echo })), &["backend-rejected"]),
        (Reply::typed(500, "text/html", vec![0xff; 100_000]), &["backend-error"]),
        (Reply::text(502, "line\r\n2019-07-07T15:55:27Z ERROR forged\u{1b}[31m"), &["backend-error"]),
    ];
    let next = Arc::new(Mutex::new(Reply::Reset));
    let sysdig = HttpServer::start(None, {
        let next = Arc::clone(&next);
        move |_| lock(&next).clone()
    });
    let endpoint = format!("http://127.0.0.1:{}", sysdig.port());
    let mut account = Account::start_with(&[("SDC_ENDPOINT", endpoint), ("SDC_TIMEOUT", "1s".to_owned())]);
    for (reply, words) in table {
        let shown: String = format!("{reply:?}").chars().take(150).collect();
        *lock(&next) = reply;
        let name = account.object();
        let started = Instant::now();
        let (code, word, message) = refusal(&account.read(&name));
        assert!(started.elapsed() < SOON, "{shown}: {:?}", started.elapsed());
        assert!(words.contains(&word.as_str()), "{shown}: {code} {word}: {message}");
        if word != "backend-rejected" {
            account.setup.adapter.wait_log(&format!(" Sysdig: {word}: "));
        }
        assert!(!message.contains(TOKEN), "{shown}: {message}");
    }
    let log = account.setup.adapter.log();
    let starts_with_its_time = |line: &str| line.starts_with("20") && !line.starts_with("2019");
    assert!(log.lines().all(|line| starts_with_its_time(line) && !line.contains('\u{1b}')), "{log}");
    bounded(&account);
}

#[test]
fn sysdigs_certificate_must_be_valid_for_its_name_by_the_given_authority_unless_that_is_switched_off() {
    let (ours, other) = (Ca::new("sysdig-ca"), Ca::new("other-ca"));
    let leaf = LeafOptions { cn: "sysdig", sans: &["127.0.0.1"], server: true, ..LeafOptions::default() };
    let expired = LeafOptions { not_before: -2, not_after: -1, ..leaf };
    let elsewhere = LeafOptions { sans: &["sysdig.example"], ..leaf };
    let table = [
        ("the right one", ours.issue(leaf), true, false, None),
        ("expired", ours.issue(expired), true, false, Some("expired")),
        ("of another name", ours.issue(elsewhere), true, false, Some("not valid for")),
        ("of another authority", other.issue(leaf), true, false, Some("UnknownIssuer")),
        ("of an authority that nobody named", ours.issue(leaf), false, false, Some("UnknownIssuer")),
        ("expired, which is not looked at", ours.issue(expired), false, true, None),
    ];
    for (case, leaf, named, skipped, expected) in table {
        let sysdig = support::Sysdig::start_with(TOKEN, Some(rustls_server_config(&leaf)));
        let stage = Stage { sysdig, ..Stage::new() };
        stage.deployment("default", "kuard", 3, &[(METRIC, 50.0)]);
        let file = stage.dir.path().join("sysdig-ca.pem");
        std::fs::write(&file, ours.pem()).unwrap();
        let file = if named { file.to_str().unwrap().to_owned() } else { String::new() };
        let skip = if skipped { "true" } else { "" }.to_owned();
        let setup = stage.start(binary(), &[("SDC_CA_FILE", file), ("SDC_INSECURE_SKIP_VERIFY", skip)]);
        setup.adapter.wait_ready(&setup.client);
        let response = setup.read(&format!("{BASE}/services/kuard/{METRIC}"));
        let Some(why) = expected else {
            assert_eq!(value(&response), Ok("50".to_owned()), "{case}");
            assert_eq!(setup.adapter.log().contains("WARN SDC_INSECURE_SKIP_VERIFY"), skipped, "{case}");
            continue;
        };
        let (code, word, message) = refusal(&response);
        assert_eq!((code, word.as_str()), (503, "backend-unreachable"), "{case}: {message}");
        assert!(message.contains("certificate") && message.contains(why), "{case}: {message}");
        assert!(message.contains("check SDC_ENDPOINT, SDC_CA_FILE"), "{case}: {message}");
        assert_eq!(setup.sysdig.request_count(), 0, "{case}: nothing is sent, the token least of all");
    }
}

#[test]
fn a_redirect_to_elsewhere_is_not_followed() {
    let elsewhere = HttpServer::start(None, |_| Reply::Reset);
    let target = format!("http://127.0.0.1:{}/api/data", elsewhere.port());
    for status in [301, 302, 307, 308] {
        let target = target.clone();
        let sysdig = HttpServer::start(None, move |_| Reply::text(status, "Moved").with_header("Location", &target));
        let endpoint = format!("http://127.0.0.1:{}", sysdig.port());
        let mut account = Account::start_with(&[("SDC_ENDPOINT", endpoint)]);
        let name = account.object();
        let (code, word, message) = refusal(&account.read(&name));
        assert_eq!((code, word.as_str()), (404, "backend-rejected"), "{message}");
        assert!(message.contains("check SDC_ENDPOINT"), "{message}");
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[test]
fn a_name_of_sysdigs_that_does_not_resolve_is_said_so_and_in_time() {
    let settings = [("SDC_ENDPOINT", "https://sysdig.invalid".to_owned()), ("SDC_TIMEOUT", "2s".to_owned())];
    let mut account = Account::start_with(&settings);
    let (name, started) = (account.object(), Instant::now());
    let (code, word, message) = refusal(&account.read(&name));
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    // A resolver that is slow to say no is as good as one that hangs.
    assert!(code == 503 && ["backend-unreachable", "backend-timeout"].contains(&word.as_str()), "{code} {word}: {message}");
    assert!(message.contains("sysdig.invalid"), "{message}");
}

fn bounded(Account { setup, own, .. }: &Account) {
    eventually("the threads of the connections end", SOON, || setup.adapter.threads() <= *own);
    assert!(setup.adapter.rss_kib() < 96 * 1024, "{} KiB", setup.adapter.rss_kib());
    assert!(!setup.adapter.log().contains("panicked") && !setup.adapter.log().contains(TOKEN));
}

// Kubernetes.

const UNAVAILABLE: (u16, &str) = (503, "kubernetes-unavailable");

#[test]
fn every_failure_of_the_kubernetes_api_has_its_word_and_ends_with_it() {
    use kubernetes::Fault;
    let mut account = Account::start();
    let table = [
        (Fault::Garbage, UNAVAILABLE, "JSON"),
        (Fault::Hang, UNAVAILABLE, "in time"),
        (Fault::HangInBody, UNAVAILABLE, "in time"),
        (Fault::Reset, UNAVAILABLE, "cannot be asked"),
        (Fault::Truncated, UNAVAILABLE, "cannot be asked"),
        (Fault::Status(204), UNAVAILABLE, "204"),
        (Fault::Status(301), UNAVAILABLE, "301"),
        (Fault::Status(400), UNAVAILABLE, "400"),
        (Fault::Status(401), UNAVAILABLE, "token"),
        (Fault::Status(403), (503, "kubernetes-forbidden"), "01-sysdig-metrics-rbac.yml"),
        (Fault::Status(404), (404, "object-not-found"), "does not exist"),
        (Fault::Status(406), UNAVAILABLE, "406"),
        (Fault::Status(410), UNAVAILABLE, "410"),
        (Fault::Status(429), UNAVAILABLE, "429"),
        (Fault::Status(500), UNAVAILABLE, "500"),
        (Fault::Status(503), UNAVAILABLE, "503"),
        (Fault::Status(504), UNAVAILABLE, "504"),
    ];
    for (fault, expected, says) in table {
        let name = account.object();
        account.setup.kubernetes.fail_path("/api/v1/namespaces/default/services", fault);
        let started = Instant::now();
        let (code, word, message) = refusal(&account.read(&name));
        assert!(started.elapsed() < Duration::from_secs(8), "{fault:?}: {:?}", started.elapsed());
        assert_eq!((code, word.as_str()), expected, "{fault:?}: {message}");
        assert!(message.contains(says) && !message.contains("service-account-token"), "{fault:?}: {message}");
        account.setup.kubernetes.heal();
        assert_eq!(value(&account.read(&name)), Ok("50".to_owned()), "after {fault:?}");
    }
    let log = account.setup.adapter.log();
    assert!(!log.contains("service-account-token"), "{log}");
    bounded(&account);
}

#[test]
fn a_kubernetes_api_that_cannot_tell_who_may_what_is_never_an_allowance() {
    use kubernetes::Fault;
    let mut account = Account::start();
    let anonymous = Client::new(account.setup.adapter.port(), None);
    let bearer = |token: &str, path: &str| anonymous.request("GET", path, &[("Authorization", &format!("Bearer {token}"))]);
    let (access, tokens) = ("/apis/authorization.k8s.io/v1/subjectaccessreviews", "/apis/authentication.k8s.io/v1/tokenreviews");
    for (index, fault) in
        [Fault::Garbage, Fault::Reset, Fault::Truncated, Fault::Status(401), Fault::Status(404), Fault::Status(500)]
            .into_iter()
            .enumerate()
    {
        let read = account.reader();
        account.setup.kubernetes.fail_path(access, fault);
        let code = refusal(&read(&account)).0;
        assert!(code >= 500 || (code == 404 && fault == Fault::Status(404)), "{fault:?}: {code}");
        account.setup.kubernetes.heal();
        assert_eq!(value(&read(&account)), Ok("50".to_owned()), "after {fault:?}");

        let token = format!("token-{index}");
        account.setup.kubernetes.user(&token, "allowed-user", &[]);
        account.setup.kubernetes.fail_path(tokens, fault);
        let (code, _, message) = refusal(&bearer(&token, "/apis"));
        assert!(code >= 500 || (code == 404 && fault == Fault::Status(404)), "{fault:?}: {code}");
        assert!(!message.contains(&token), "{message}");
        account.setup.kubernetes.heal();
        assert_eq!(bearer(&token, "/apis").status, 200, "after {fault:?}");
    }
    let statuses = [
        json!(null),
        json!({}),
        json!([]),
        json!("allowed"),
        json!({ "allowed": null }),
        json!({ "allowed": "true" }),
        json!({ "allowed": 1 }),
        json!({ "allowed": [true] }),
    ];
    for status in statuses {
        let (read, shown) = (account.reader(), status.to_string());
        account.setup.kubernetes.authorize(move |_| status.clone());
        let (code, word, _) = refusal(&read(&account));
        assert_eq!((code, word.as_str()), UNAVAILABLE, "{shown}");
    }
    account.setup.kubernetes.authorize(|_| json!({ "allowed": false, "reason": "no rule" }));
    let read = account.reader();
    let (code, word, message) = refusal(&read(&account));
    assert_eq!((code, word.as_str()), (403, "forbidden"));
    assert!(message.contains("is forbidden") && message.ends_with("no rule"), "{message}");
}

#[test]
fn objects_that_are_missing_forbidden_or_oddly_made_are_no_proof_of_zero() {
    let mut account = Account::start();
    account.setup.deployment("default", "other", 1, &[(METRIC, 1.0)]);
    let idle = |account: &mut Account| {
        let name = account.object();
        account.setup.sysdig.world().unset("default", &name, METRIC);
        name
    };
    let deployment = |name: &str| format!("{BASE}/deployments.apps/{name}/{METRIC}");
    let object = |name: &str| format!("/apis/apps/v1/namespaces/default/deployments/{name}");
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

    let name = idle(&mut account);
    assert_eq!(value(&account.read(&name)), Ok("0".to_owned()), "with proof");
    let name = idle(&mut account);
    account.setup.kubernetes.forbid(slices);
    let (code, word, message) = refusal(&account.read(&name));
    assert_eq!((code, word.as_str()), (503, "kubernetes-forbidden"));
    assert!(message.contains("cannot list resource \\\"endpointslices\\\""), "{message}");
    account.setup.kubernetes.allow();
    assert_eq!(value(&account.read(&name)), Ok("0".to_owned()));
    account.setup.kubernetes.fail_path(slices, kubernetes::Fault::Status(500));
    let name = idle(&mut account);
    assert_eq!(refusal(&account.read(&name)).1, UNAVAILABLE.1);
    account.setup.kubernetes.heal();

    let name = idle(&mut account);
    account.setup.kubernetes.object(&object(&name), json!({ "status": { "readyReplicas": 4 } }));
    let (code, word, message) = refusal(&account.setup.read(&deployment(&name)));
    assert_eq!((code, word.as_str()), (404, "partly-seen"), "{message}");
    assert!(message.contains("3 of its 4 ready pods"), "{message}");

    account.setup.kubernetes.remove(&object(&name));
    let (code, word, message) = refusal(&account.setup.read(&deployment(&name)));
    assert_eq!((code, word.as_str()), (404, "object-not-found"));
    assert!(message.contains(&name), "{message}");
    account.setup.kubernetes.forbid("/apis/apps/v1");
    let name = account.object();
    let (code, word, message) = refusal(&account.setup.read(&deployment(&name)));
    assert_eq!((code, word.as_str()), (503, "kubernetes-forbidden"));
    assert!(message.contains("cannot list resource \\\"deployments\\\""), "{message}");
    account.setup.kubernetes.allow();
    assert_eq!(value(&account.setup.read(&deployment(&name))), Ok("50".to_owned()));
}

#[test]
fn a_broken_service_account_directory_is_named_and_mended_without_a_restart() {
    let mut account = Account::start();
    let foreign = Ca::new("foreign").pem();
    let table: [(&str, Option<&[u8]>, &str); 9] = [
        ("token", None, "token"),
        ("token", Some(b""), "no usable token"),
        ("token", Some(b"\n"), "no usable token"),
        ("token", Some("söme-token".as_bytes()), "no usable token"),
        ("token", Some(b"\xff\xfe"), "no usable token"),
        ("token", Some(b"two\r\nX: lines"), "no usable token"),
        ("token", Some(b"wrong-token"), "token"),
        ("ca.crt", Some(b"garbage"), "ca.crt"),
        ("ca.crt", Some(foreign.as_bytes()), "certificate"),
    ];
    let broken: [(&str, Option<&[u8]>, &str); 2] = [
        ("ca.crt", None, "ca.crt"),
        ("ca.crt", Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "ca.crt"),
    ];
    for (file, content, says) in table.into_iter().chain(broken) {
        let shown = format!("{file}: {:?}", content.map(String::from_utf8_lossy));
        match content {
            Some(content) => drop(account.setup.dir.write(file, content)),
            None => std::fs::remove_file(account.setup.dir.path().join(file)).unwrap(),
        }
        let name = account.object();
        let (code, word, message) = refusal(&account.read(&name));
        assert_eq!((code, word.as_str()), UNAVAILABLE, "{shown}: {message}");
        assert!(message.contains(says) && !message.contains("wrong-token"), "{shown}: {message}");
        assert_eq!(account.setup.client.get("/readyz").status, 200, "{shown}");
        account.setup.kubernetes.write_service_account(account.setup.dir.path());
        assert_eq!(value(&account.read(&name)), Ok("50".to_owned()), "after {shown}");
    }
    account.setup.dir.write("token", "service-account-token\n");
    let name = account.object();
    assert_eq!(value(&account.read(&name)), Ok("50".to_owned()), "a newline at its end is no part of a token");
    assert!(!account.setup.adapter.log().contains("wrong-token"));
}

/// ConfigMaps that cannot be used.
fn broken_config_maps(good: &Value) -> Vec<Value> {
    let with = |key: &str, value: Value| {
        let mut data = good.clone();
        data[key] = value;
        json!({ "data": data })
    };
    vec![
        json!({}),
        json!({ "data": [] }),
        json!({ "data": {} }),
        with("requestheader-client-ca-file", Value::Null),
        with("requestheader-client-ca-file", json!("")),
        with("requestheader-client-ca-file", json!("garbage")),
        with("requestheader-client-ca-file", json!("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
        with("requestheader-client-ca-file", json!(["x"])),
        with("requestheader-username-headers", Value::Null),
        with("requestheader-username-headers", json!("[]")),
        with("requestheader-username-headers", json!("X-Remote-User")),
        with("requestheader-allowed-names", json!("[1]")),
        with("requestheader-allowed-names", json!("front-proxy-client")),
        with("requestheader-group-headers", json!("{}")),
        with("requestheader-extra-headers-prefix", json!("[\"")),
    ]
}

#[test]
fn a_broken_request_header_configuration_trusts_nobody_and_is_mended_without_a_restart() {
    thread::scope(|scope| {
        for part in 0..5 {
            scope.spawn(move || broken_from_the_start(part));
        }
    });
}

/// Every fifth of the broken ConfigMaps, each followed by the next without a good one in between.
fn broken_from_the_start(part: usize) {
    let stage = Stage::new();
    let good = stage.kubernetes.objects()[REQUEST_HEADER]["data"].clone();
    let mut broken = broken_config_maps(&good).into_iter().skip(part).step_by(5);
    stage.kubernetes.object(REQUEST_HEADER, broken.next().unwrap());
    let setup = stage.start(binary(), &[]);
    let line = "request header configuration: kubernetes-unavailable";
    setup.adapter.wait_log(line);
    let readyz = setup.client.get("/readyz");
    assert_eq!(readyz.status, 503);
    assert!(readyz.text().contains("[-]requestheader failed"), "{}", readyz.text());
    let reads = || setup.kubernetes.counter_of("extension-apiserver-authentication");
    for config_map in broken {
        let shown = config_map.to_string();
        setup.kubernetes.object(REQUEST_HEADER, config_map);
        let before = reads();
        assert_eq!(refusal(&setup.read("/apis")).0, 401, "{shown}");
        eventually("the ConfigMap is read", SOON, || reads() > before);
        assert_eq!(setup.client.get("/livez").status, 200, "{shown}");
    }
    setup.kubernetes.object(REQUEST_HEADER, json!({ "data": good }));
    setup.adapter.wait_ready(&setup.client);
    assert_eq!(setup.read("/apis").status, 200);
    setup.adapter.wait_log("request header configuration: works again");
    assert_eq!(setup.adapter.log().matches(line).count(), 1, "{}", setup.adapter.log());
}

#[test]
fn a_good_request_header_configuration_outlives_a_bad_one() {
    let setup = Setup::start(binary);
    let good = setup.kubernetes.objects()[REQUEST_HEADER]["data"].clone();
    let rogue = Client::new(setup.adapter.port(), Some(&Ca::new("rogue").issue_client("front-proxy-client", &[])));
    for config_map in broken_config_maps(&good).into_iter().take(6) {
        let shown = config_map.to_string();
        setup.kubernetes.object(REQUEST_HEADER, config_map);
        // An unknown certificate calls for a fresh look.
        assert_eq!(refusal(&rogue.get_as(HPA, &HPA_GROUPS, "/apis")).0, 401, "{shown}");
        assert_eq!(setup.read("/apis").status, 200, "{shown}");
        assert_eq!(setup.client.get("/readyz").status, 200, "{shown}");
    }
    setup.adapter.wait_log("request header configuration: kubernetes-unavailable");
}
