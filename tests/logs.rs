//! The log, level by level, as the table in README.md tells.

mod support;

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;
use std::{fs, thread};

use support::{Adapter, Client, HPA, HPA_GROUPS, READ, Stage, TOKEN, kubernetes, poll, sysdig};

const LEVELS: [&str; 4] = ["error", "warn", "info", "debug"];

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// What each level adds, in the order of [`LEVELS`].
const LINES: [&[&str]; 4] = [
    &[],
    &["WARN Sysdig: backend-error: ", "WARN Kubernetes API: kubernetes-unavailable: "],
    &[
        "INFO sysdig-metrics-adapter ",
        "INFO metrics on 127.0.0.1:",
        "INFO Sysdig: works again (failures: 2)",
        "INFO Kubernetes API: works again (failures: 1)",
        "INFO ending: not ready any more",
    ],
    &[
        "DEBUG objects: 1 services: kuard",
        "DEBUG Sysdig is asked: /api/data ",
        "DEBUG Sysdig answers: ",
        "DEBUG GET /apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count by \"system:serviceaccount:kube-system:horizontal-pod-autoscaler\" in ",
        ": 200 ok",
        ": 503 backend-error: Sysdig fails (503: ",
        "\"you sent\":\"(hidden)\"",
        "DEBUG GET /nowhere?a=%0a",
        ": 404 not-found: nothing is served at \"/nowhere\"",
        " by \"\" in ",
    ],
];

/// Two outages, each with its end; then the process ends. Returns the log.
fn life(level: &str) -> String {
    let stage = Stage::new();
    let client = |port| Client::new(port, Some(&stage.front_proxy()));
    let mut env = stage.env();
    env.extend([("RUST_LOG", level.to_owned()), ("METRICS_ADDR", "127.0.0.1:0".to_owned())]);
    // Below level info the log does not tell the port, so one is chosen here, which others may take meanwhile.
    let start = || {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut env = env.clone();
        env.push(("LISTEN_ADDR", format!("127.0.0.1:{port}")));
        let (adapter, client) = (Adapter::spawn(binary(), &env), client(port));
        let is_ready = || client.try_request("GET", "/readyz", &[]).is_ok_and(|response| response.status == 200);
        let ready = poll(Duration::from_secs(15), || match adapter.wait_exit(Duration::ZERO) {
            Some(_) => Some(false),
            None => is_ready().then_some(true),
        });
        ready.expect(level).then_some((adapter, client))
    };
    let (adapter, client) = (0..5).find_map(|_| start()).expect("a port of its own");
    let read = || client.get_as(HPA, &HPA_GROUPS, READ).status;
    assert_eq!(read(), 200);
    stage.sysdig.fail(sysdig::Fault::Status(503));
    assert_eq!([read(), read()], [503, 503]);
    stage.sysdig.heal();
    assert_eq!(read(), 200);
    let echo = format!(r#"{{"data":[],"you sent":"{TOKEN}"}}"#);
    stage.sysdig.fail(sysdig::Fault::Body(echo));
    assert_eq!(read(), 404);
    stage.sysdig.heal();
    stage.kubernetes.fail_path("/api/v1/namespaces/default/services", kubernetes::Fault::Status(503));
    assert_eq!(read(), 503);
    stage.kubernetes.heal();
    assert_eq!(read(), 200);
    assert_eq!(client.get_as(HPA, &[], "/nowhere?a=%0a").status, 404);
    let bearer = [("Authorization", "Bearer secret-of-a-caller")];
    assert_eq!(client.request("GET", READ, &bearer).status, 401);
    adapter.terminate();
    assert!(adapter.wait_exit(Duration::from_secs(25)).is_some_and(|status| status.success()));
    adapter.log()
}

#[test]
fn each_level_holds_what_the_table_says_and_no_secret() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let table = readme.split_once("| log level | what it holds |\n").expect("the table").1.lines().skip(1);
    let rows = table.map_while(|line| line.strip_prefix("| `")?.split_once('`')).map(|(level, _)| level);
    assert_eq!(rows.collect::<Vec<_>>(), LEVELS);
    let lives: Vec<_> = LEVELS.map(|level| thread::spawn(move || life(level))).into_iter().collect();
    for (index, life) in lives.into_iter().enumerate() {
        let (log, level) = (life.join().expect("its life"), LEVELS[index]);
        for line in LINES[..=index].iter().copied().flatten() {
            assert!(log.contains(line), "{level}, {line:?}:\n{log}");
        }
        for other in &LEVELS[index + 1..] {
            let word = format!("Z {} ", other.to_uppercase());
            assert!(!log.contains(&word), "{level}, {word}:\n{log}");
        }
        for secret in [TOKEN, "secret-of-a-caller", "Bearer", "PRIVATE KEY"] {
            assert!(!log.contains(secret), "{level}, {secret}:\n{log}");
        }
        let stamped = |line: &str| line.get(19..21) == Some("Z ");
        assert!(log.lines().all(stamped), "{level}:\n{log}");
    }
}

#[test]
fn why_the_process_ends_is_told_at_every_level() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for level in LEVELS {
        let stage = Stage::new();
        let mut env = stage.env();
        env.extend([("RUST_LOG", level.to_owned()), ("LISTEN_ADDR", address.clone())]);
        let adapter = Adapter::spawn(binary(), &env);
        assert_eq!(adapter.wait_exit(Duration::from_secs(15)).expect(level).code(), Some(1));
        assert!(adapter.log().contains("Z ERROR LISTEN_ADDR: "), "{level}: {}", adapter.log());
    }
}
