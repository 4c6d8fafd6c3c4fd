//! The TLS port as its clients see it: who gets in, who is answered at once, and how a connection ends.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore, StreamOwned};
use serde_json::{Value, json};
use support::client::SERVER_NAME;
use support::http::lock;
use support::sysdig::Fault;
use support::{Ca, Client, Connection, HPA, HPA_GROUPS, READ, Response, Setup, Stage, eventually, poll};

/// At once, on a machine that runs other tests meanwhile.
const AT_ONCE: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(10);

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// The binary with that many file descriptors.
fn limited(descriptors: usize) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -n {descriptors}; exec \"$0\"")).arg(binary().get_program());
    command
}

fn anonymous(setup: &Setup) -> Client {
    Client::new(setup.adapter.port(), None)
}

/// A client whose certificate has the right name from the wrong authority.
fn rogue(setup: &Setup) -> Client {
    Client::new(setup.adapter.port(), Some(&Ca::new("rogue").issue_client("front-proxy-client", &[])))
}

fn word(response: &Response) -> String {
    response.json()["details"]["causes"][0]["reason"].as_str().unwrap_or_default().to_owned()
}

/// Opens that many connections, as near to the same moment as threads allow.
fn burst(client: &Client, count: usize) -> Vec<Connection> {
    thread::scope(|scope| {
        let opening: Vec<_> = (0..count).map(|_| scope.spawn(|| client.connect())).collect();
        opening.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn connections_opened_in_a_burst_and_kept_alive_are_all_answered_at_once() {
    let setup = Setup::start(binary);
    setup.client.get_as(HPA, &HPA_GROUPS, "/apis");
    for (client, user) in [(&setup.client, format!("X-Remote-User: {HPA}\r\n")), (&anonymous(&setup), String::new())] {
        let target = if user.is_empty() { "/version" } else { "/apis" };
        let groups: String = HPA_GROUPS.iter().map(|group| format!("X-Remote-Group: {group}\r\n")).collect();
        let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\n{user}{groups}\r\n");
        for count in [5, 16, 64] {
            let mut connections = burst(client, count);
            for round in 0..10 {
                let started = Instant::now();
                for connection in &mut connections {
                    connection.send_raw(&request);
                }
                for (index, connection) in connections.iter_mut().enumerate() {
                    let response = connection.read_response();
                    assert_eq!(response.status, 200, "{index} of {count} in round {round}: {}", response.text());
                    assert_eq!(response.header("connection"), None);
                }
                assert!(started.elapsed() < AT_ONCE, "{count} in round {round}: {:?}", started.elapsed());
            }
        }
    }
}

#[test]
fn reads_over_a_burst_of_connections_are_answered_while_others_stay_silent() {
    let setup = Setup::start(binary);
    setup.read(READ);
    let _silent = burst(&setup.client, 16);
    let mut connections = burst(&setup.client, 16);
    for _ in 0..3 {
        let started = Instant::now();
        thread::scope(|scope| {
            for connection in &mut connections {
                scope.spawn(|| assert_eq!(connection.get_as(HPA, &HPA_GROUPS, READ).status, 200));
            }
        });
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    }
}

#[test]
fn names_beyond_ascii_reach_the_access_review_unchanged() {
    let stage = Stage::new();
    let specs: Arc<Mutex<Vec<Value>>> = Arc::default();
    let seen = Arc::clone(&specs);
    stage.kubernetes.authorize(move |spec| {
        lock(&seen).push(spec.clone());
        // Not everything: so that the exact question follows.
        json!({ "allowed": spec["resourceAttributes"]["resource"] != "*" })
    });
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    for (user, group) in [("josé", "Équipe"), ("用户", "a b%20c, d"), ("per%cent", "ops;x=1"), ("é".repeat(200).as_str(), "😀")]
    {
        lock(&specs).clear();
        let headers = [("X-Remote-User", user), ("X-Remote-Group", group), ("X-Remote-Extra-Où", "là"), ("X-Remote-Uid", "ü")];
        let response = setup.client.request("GET", "/apis", &headers[..2]);
        assert_eq!(response.status, 200, "{}", response.text());
        let spec = lock(&specs).pop().unwrap();
        assert_eq!(spec["user"], user);
        assert_eq!(spec["groups"], json!([group, "system:authenticated"]));
        let response = setup.client.request("GET", READ, &[headers[0], headers[1], headers[3]]);
        assert_eq!(response.status, 200, "{}", response.text());
        let spec = lock(&specs).pop().unwrap();
        assert_eq!((&spec["user"], &spec["uid"]), (&json!(user), &json!("ü")));
        assert_eq!(spec["resourceAttributes"]["name"], "kuard");
        assert_eq!(setup.client.request("GET", "/apis", &headers).status, 400, "a header's name is ASCII");
    }
}

#[test]
fn a_head_may_be_as_large_as_its_sender_is_trusted() {
    let setup = Setup::start(binary);
    let padded = |client: &Client, kibibytes: usize, target: &str| {
        let mut connection = client.connect();
        let groups: String = HPA_GROUPS.iter().map(|group| format!("X-Remote-Group: {group}\r\n")).collect();
        let padding = format!("X-Padding: {}\r\n", "p".repeat(1011)).repeat(kibibytes);
        let head = format!("GET {target} HTTP/1.1\r\nHost: a\r\nX-Remote-User: {HPA}\r\n{groups}{padding}\r\n");
        connection.send_raw(head);
        let response = connection.read_response();
        if response.status == 431 {
            assert_eq!((word(&response).as_str(), response.header("connection")), ("head-too-large", Some("close")));
            assert!(connection.closed());
        } else {
            assert_eq!(connection.get("/version").status, 200, "the connection goes on");
        }
        response.status
    };
    for client in [&anonymous(&setup), &rogue(&setup)] {
        assert_eq!([padded(client, 30, "/version"), padded(client, 33, "/version")], [200, 431]);
    }
    let sizes = [30, 33, 300, 900, 1024, 1100];
    assert_eq!(sizes.map(|size| padded(&setup.client, size, READ)), [200, 200, 200, 200, 431, 431]);
    assert_eq!(setup.read(READ).status, 200);
}

#[test]
fn slow_and_silent_peers_delay_nobody_else() {
    let setup = Setup::start(binary);
    setup.client.get_as(HPA, &HPA_GROUPS, "/apis");
    let anonymous = anonymous(&setup);
    let mut slow: Vec<Connection> = (0..4).flat_map(|_| burst(&anonymous, 50)).collect();
    let connect = |_| TcpStream::connect((Ipv4Addr::LOCALHOST, setup.adapter.port())).unwrap();
    let silent: Vec<TcpStream> = (0..100).map(connect).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let head = "GET / HTTP/1.1\r\nX: ".bytes().chain(std::iter::repeat(b'x'));
            for byte in head.take_while(|_| !done.load(Ordering::Relaxed)) {
                // Some may have been closed for newer ones.
                slow.iter_mut().for_each(|connection| drop(connection.try_send_raw([byte])));
            }
        });
        let mut kept = setup.client.connect();
        for round in 0..20 {
            let started = Instant::now();
            assert_eq!(kept.get_as(HPA, &HPA_GROUPS, "/apis").status, 200);
            assert_eq!(setup.client.get_as(HPA, &HPA_GROUPS, "/apis").status, 200);
            assert_eq!(anonymous.get("/healthz").status, 200);
            assert!(started.elapsed() < AT_ONCE, "round {round}: {:?}", started.elapsed());
        }
        done.store(true, Ordering::Relaxed);
    });
    drop(silent);
    assert!(setup.adapter.rss_kib() < 128 * 1024, "{} KiB", setup.adapter.rss_kib());
}

#[test]
fn whoever_does_not_finish_a_handshake_or_a_head_is_let_go_after_ten_seconds() {
    let setup = Setup::start(binary);
    let (port, anonymous) = (setup.adapter.port(), anonymous(&setup));
    let within = |started: Instant| (Duration::from_secs(9)..Duration::from_secs(15)).contains(&started.elapsed());
    let mut idle = anonymous.connect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
            let ended = stream.read_to_end(&mut Vec::new());
            assert!(!ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "the handshake may go on");
            assert!(within(started), "{:?}", started.elapsed());
        });
        for client in [&anonymous, &setup.client] {
            scope.spawn(|| {
                let started = Instant::now();
                let mut connection = client.connect();
                connection.send_raw("GET /apis HTTP/1.1\r\nHost: a\r\nX: ");
                // Bytes that come one by one do not put the deadline off.
                for _ in 0..80 {
                    connection.send_raw("x");
                    poll(Duration::from_millis(100), || None::<()>);
                }
                let response = connection.read_response();
                assert_eq!((response.status, word(&response).as_str()), (408, "request-timeout"));
                assert!(connection.closed() && within(started), "{:?}", started.elapsed());
            });
        }
    });
    assert_eq!(idle.get("/healthz").status, 200, "silence between requests lasts longer");
}

#[test]
fn when_all_places_are_taken_the_oldest_peer_that_proved_nothing_makes_room() {
    let setup = Setup::start_with(|| limited(128), &[("RUST_LOG", "sysdig_metrics_adapter=debug".to_owned())]);
    let anonymous = anonymous(&setup);
    let mut verified = setup.client.connect();
    assert_eq!(verified.get("/readyz").status, 200);
    let mut crowd: Vec<Connection> = Vec::new();
    for index in 0..40 {
        let mut connection = anonymous.connect();
        assert_eq!(connection.get("/healthz").status, 200, "connection {index}");
        crowd.push(connection);
    }
    assert!(crowd[0].closed_within(SOON), "the oldest is closed");
    assert!(crowd[20].closed_within(SOON), "and those after it");
    assert_eq!(crowd[39].get("/healthz").status, 200, "the newest stays");
    assert_eq!(verified.get_as(HPA, &HPA_GROUPS, "/apis").status, 200, "who is verified stays");
    assert_eq!(setup.read(READ).status, 200, "and gets in");

    let connect = |_| TcpStream::connect((Ipv4Addr::LOCALHOST, setup.adapter.port())).unwrap();
    let handshaking: Vec<TcpStream> = (0..40).map(connect).collect();
    assert_eq!(anonymous.get("/healthz").status, 200, "a probe gets in");
    assert_eq!(setup.read(READ).status, 200);
    assert_eq!(verified.get_as(HPA, &HPA_GROUPS, "/apis").status, 200);
    drop((crowd, handshaking));
    eventually("descriptors are given back", SOON, || setup.adapter.descriptors() < 30);
    assert_eq!(anonymous.get("/healthz").status, 200);
    assert!(!setup.adapter.log().contains("Too many open files"), "{}", setup.adapter.log());
}

#[test]
fn verified_connections_are_never_closed_for_new_ones() {
    let setup = Setup::start_with(|| limited(128), &[]);
    let mut verified: Vec<Connection> = Vec::new();
    // Until one does not get in: the connection is closed without an answer.
    while let Ok(mut connection) = setup.client.try_connect()
        && connection.try_request("GET", "/readyz", &[]).is_ok_and(|response| response.status == 200)
    {
        verified.push(connection);
        assert!(verified.len() < 32, "there is no limit");
    }
    assert!(verified.len() >= 8, "{} places", verified.len());
    for connection in &mut verified {
        assert_eq!(connection.get("/readyz").status, 200);
    }
    verified.pop();
    let gets_in = || setup.client.try_request("GET", "/readyz", &[]).is_ok_and(|response| response.status == 200);
    eventually("a place that is given back is free", SOON, gets_in);
}

/// A certificate that nobody knows makes its request wait for a fresh look at the configuration; connections that
/// were closed meanwhile still have their threads and descriptors.
#[test]
fn a_flood_of_unknown_certificates_uses_up_neither_descriptors_nor_threads() {
    let setup = Setup::start_with(|| limited(256), &[("RUST_LOG", "sysdig_metrics_adapter=debug".to_owned())]);
    let (rogue, done) = (rogue(&setup), AtomicBool::new(false));
    let mut kept = setup.client.connect();
    assert_eq!(kept.get_as(HPA, &HPA_GROUPS, "/apis").status, 200);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut open = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let Ok(mut connection) = rogue.try_connect() else { continue };
                    // It may have been closed for another already.
                    let _ = connection.try_send_raw("GET /apis HTTP/1.1\r\nHost: a\r\n\r\n");
                    open.push(connection);
                    if open.len() > 100 {
                        open.clear();
                    }
                }
            });
        }
        let started = Instant::now();
        let mut most = (0, 0);
        while started.elapsed() < Duration::from_secs(3) {
            assert_eq!(kept.get_as(HPA, &HPA_GROUPS, "/apis").status, 200);
            most = (most.0.max(setup.adapter.descriptors()), most.1.max(setup.adapter.threads()));
        }
        done.store(true, Ordering::Relaxed);
        assert!(most.0 < 256 && most.1 < 128, "{most:?}");
    });
    for client in [&setup.client, &anonymous(&setup)] {
        eventually("the port works", SOON, || client.try_request("GET", "/healthz", &[]).is_ok_and(|r| r.status == 200));
    }
    assert_eq!(setup.read(READ).status, 200);
    let log = setup.adapter.log();
    assert!(!log.contains("Too many open files") && !log.contains("inner server"), "{log}");
}

#[test]
fn both_versions_of_tls_are_served_unless_one_is_forbidden() {
    let setup = Setup::start(binary);
    let front_proxy = setup.front_proxy();
    for (version, name) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        let client = Client::speaking(setup.adapter.port(), Some(&front_proxy), &[version]);
        let mut connection = client.connect();
        assert_eq!((connection.version(), connection.alpn()), (Some(name), Some(&b"http/1.1"[..])));
        assert_eq!(connection.get_as(HPA, &HPA_GROUPS, READ).status, 200, "{name:?}");
        let mut nobody = Client::speaking(setup.adapter.port(), None, &[version]).connect();
        assert_eq!([nobody.get("/apis").status, nobody.get("/healthz").status], [401, 200], "{name:?}");
    }
    drop(setup);
    let setup = Setup::start_with(binary, &[("TLS_MIN_VERSION", "1.3".to_owned())]);
    let refused = Client::speaking(setup.adapter.port(), None, &[&TLS12]).try_connect();
    assert!(refused.unwrap_err().to_string().contains("ProtocolVersion"));
    let mut connection = Client::speaking(setup.adapter.port(), None, &[&TLS13]).connect();
    assert_eq!(connection.get("/healthz").status, 200);
}

#[test]
fn no_session_is_resumed_so_that_every_connection_proves_itself() {
    let stage = Stage::new();
    let ca = Ca::new("serving");
    let (chain, key) = ca.issue_server(&[SERVER_NAME]).write(stage.dir.path());
    let files = [("TLS_CERT_FILE", chain.display().to_string()), ("TLS_KEY_FILE", key.display().to_string())];
    let setup = stage.start(binary(), &files);
    setup.adapter.wait_ready(&setup.client);
    let leaf = setup.front_proxy();
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    for version in [&TLS12, &TLS13] {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(leaf.chain(), leaf.private_key())
            .unwrap();
        let config = Arc::new(config);
        for _ in 0..3 {
            let name = ServerName::try_from(SERVER_NAME).unwrap();
            let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, setup.adapter.port())).unwrap();
            tcp.set_read_timeout(Some(SOON)).unwrap();
            let mut stream = StreamOwned::new(ClientConnection::new(Arc::clone(&config), name).unwrap(), tcp);
            let head = format!("GET /apis HTTP/1.1\r\nHost: a\r\nX-Remote-User: {HPA}\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            assert_eq!(stream.conn.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
}

#[test]
fn a_certificate_that_is_not_trusted_completes_the_handshake_and_proves_nothing() {
    let setup = Setup::start(binary);
    let port = setup.adapter.port();
    let wrong_name = setup.front_proxy_ca.issue_client("somebody-else", &[]);
    let expired = setup.front_proxy_ca.issue(support::LeafOptions {
        cn: "front-proxy-client",
        client: true,
        not_before: -10,
        not_after: -1,
        ..support::LeafOptions::default()
    });
    let of_the_cluster = setup.kubernetes.ca().issue_client("front-proxy-client", &["system:masters"]);
    let clients = [
        rogue(&setup),
        Client::new(port, Some(&wrong_name)),
        Client::new(port, Some(&expired)),
        Client::new(port, Some(&of_the_cluster)),
        anonymous(&setup),
    ];
    thread::scope(|scope| {
        for (index, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                let mut connection = client.connect();
                for target in ["/apis", READ, "/", "/openapi/v2"] {
                    let response = connection.get_as("root", &["system:masters"], target);
                    assert_eq!((response.status, word(&response).as_str()), (401, "unauthenticated"), "client {index}");
                }
                assert_eq!(connection.get("/readyz").status, 200, "health is open to all");
                assert_eq!(connection.get("/version").status, 200);
            });
        }
    });
    assert_eq!(setup.kubernetes.counter_of("subjectaccessreviews"), 0);
    assert!(setup.sysdig.queries().is_empty());
}

#[test]
fn identity_headers_beside_a_bearer_token_change_nothing() {
    let stage = Stage::new();
    let specs: Arc<Mutex<Vec<Value>>> = Arc::default();
    let seen = Arc::clone(&specs);
    stage.kubernetes.authorize(move |spec| {
        lock(&seen).push(spec.clone());
        json!({ "allowed": true })
    });
    stage.kubernetes.user("a-token", "joe", &["devs"]);
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let headers = [
        ("Authorization", "Bearer a-token"),
        ("X-Remote-User", "root"),
        ("X-Remote-Group", "system:masters"),
        ("X-Remote-Extra-Scopes", "all"),
        ("X-Remote-Uid", "0"),
    ];
    let response = anonymous(&setup).request("GET", READ, &headers);
    assert_eq!(response.status, 200, "{}", response.text());
    let spec = lock(&specs).pop().unwrap();
    assert_eq!((&spec["user"], &spec["uid"]), (&json!("joe"), &json!("uid-of-joe")));
    assert_eq!(spec["groups"], json!(["devs", "system:authenticated"]));
    assert!(spec["extra"].as_object().is_none_or(serde_json::Map::is_empty), "{spec}");
}

#[test]
fn a_connection_is_kept_or_closed_as_its_client_says() {
    let setup = Setup::start(binary);
    for client in [&setup.client, &anonymous(&setup)] {
        let table = [
            ("GET /version HTTP/1.1\r\nHost: a\r\n\r\n", true),
            ("GET /version HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", true),
            ("GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nTE: trailers\r\nExpect: 100-continue\r\n\r\n", true),
            ("GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", false),
            ("GET /version HTTP/1.1\r\nHost: a\r\nConnection: TE, Close\r\n\r\n", false),
            ("GET /version HTTP/1.0\r\n\r\n", false),
            ("GET /version HTTP/1.0\r\nHost: a\r\n\r\n", false),
        ];
        for (request, kept) in table {
            let mut connection = client.connect();
            connection.send_raw(request);
            let response = connection.read_response();
            assert_eq!((response.status, response.header("connection") == Some("close")), (200, !kept), "{request}");
            assert_eq!(
                response.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("connection")).count(),
                usize::from(!kept)
            );
            if kept {
                assert_eq!(connection.get("/version").status, 200, "{request}");
            } else {
                assert!(connection.closed(), "{request}");
            }
        }
    }
}

#[test]
fn a_head_that_comes_byte_by_byte_or_with_the_next_one_is_read_the_same() {
    let setup = Setup::start(binary);
    let mut connection = setup.client.connect();
    let request = format!("GET /apis HTTP/1.1\r\nHost: a\r\nX-Remote-User: {HPA}\r\n\r\n");
    for byte in request.bytes() {
        connection.send_raw([byte]);
    }
    assert_eq!(connection.read_response().status, 200);
    let (first, second) = request.split_at(20);
    connection.send_raw(format!("{request}{first}"));
    assert_eq!(connection.read_response().status, 200);
    connection.send_raw(second);
    assert_eq!(connection.read_response().status, 200);
}

#[test]
fn an_ending_adapter_answers_what_it_has_begun_and_leaves_nothing_behind() {
    let setup = Setup::start_with(binary, &[("SDC_TIMEOUT", "20s".to_owned())]);
    let anonymous = anonymous(&setup);
    let sockets = || {
        let entries = std::fs::read_dir(setup.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| name.to_string_lossy().starts_with("sysdig-metrics-adapter-")).count()
    };
    assert_eq!(sockets(), 1);
    let mut idle = [setup.client.connect(), anonymous.connect()];
    assert_eq!(idle.each_mut().map(|connection| connection.get("/readyz").status), [200, 200]);
    let (mut kept, mut reading) = (setup.client.connect(), setup.client.connect());
    setup.sysdig.fail(Fault::Hold);
    thread::scope(|scope| {
        let answer = scope.spawn(move || (reading.get_as(HPA, &HPA_GROUPS, READ), reading.closed()));
        eventually("the read waits for Sysdig", SOON, || setup.sysdig.held() == 1);
        let asked = Instant::now();
        setup.adapter.terminate();
        eventually("it is not ready any more", SOON, || anonymous.get("/readyz").status == 503);
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        assert!(anonymous.get("/readyz").text().contains("[-]shutdown failed"));
        assert_eq!(anonymous.get("/healthz").status, 200, "it is alive all the same");
        let response = kept.get_as(HPA, &HPA_GROUPS, "/apis");
        assert_eq!((response.status, response.header("connection")), (200, Some("close")), "the last one here");
        assert!(kept.closed());
        assert_eq!(setup.client.get_as(HPA, &HPA_GROUPS, "/apis").status, 200, "requests still come for some seconds");
        assert!(setup.adapter.wait_exit(Duration::ZERO).is_none(), "a read is still under way");
        // Before the reader is told to ask again.
        setup.sysdig.heal();
        let (response, closed) = answer.join().unwrap();
        assert_eq!((response.status, response.header("connection")), (200, Some("close")), "{}", response.text());
        assert!(closed);
        for connection in &mut idle {
            assert!(connection.closed_within(SOON), "connections without a request are closed");
        }
        let status = setup.adapter.wait_exit(SOON).expect("it ends");
        assert!(status.success(), "{status}");
        assert!(asked.elapsed() < Duration::from_secs(12), "{:?}", asked.elapsed());
    });
    assert_eq!(sockets(), 0);
}

#[test]
fn an_adapter_without_work_ends_within_its_grace() {
    let setup = Setup::start(binary);
    let asked = Instant::now();
    setup.adapter.terminate();
    let status = setup.adapter.wait_exit(Duration::from_secs(12)).expect("it ends");
    assert!(status.success() && asked.elapsed() > Duration::from_secs(4), "{status} after {:?}", asked.elapsed());
}
