//! A real Prometheus (Debian's package) behind a front that plays Sysdig: its paths, its token, its limits and its faults.
#![allow(dead_code, unreachable_pub, reason = "a part of the tests, which are crates of their own and use a part of it")]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

use crate::support::clock::{eventually, unix_now};
use crate::support::dir::TempDir;
use crate::support::http::{HttpServer, Reply, Request, lock};

const STEP: i64 = 10;
/// Different metric names that one query may have.
const MOST_NAMES: usize = 10;
const START: Duration = Duration::from_secs(30);

/// Samples of one series, and over which time there are any.
#[derive(Clone, Debug)]
pub struct Samples {
    /// `orders_total{kube_pod_name="kuard-0"}`
    pub series: String,
    /// The first value, and by how much each is larger than the one before.
    pub first: f64,
    pub step: f64,
    /// Seconds from now on: the newest sample is that old. Negative for samples of the future, so that a slow test
    /// does not run out of them.
    pub newest: i64,
}

/// The server and its front; both end when dropped.
pub struct Prometheus {
    front: HttpServer,
    shared: Arc<Mutex<Front>>,
}

/// The process; ends when dropped.
struct Server {
    child: Child,
    base: String,
    _dir: TempDir,
}

struct Front {
    server: Arc<Server>,
    /// Method and decoded query of each question.
    queries: Vec<(String, String)>,
    /// Takes the place of every answer.
    reply: Option<Reply>,
}

/// Why there is no Prometheus to test against, in one line; None if there is.
pub fn missing() -> Option<&'static str> {
    let found = |name: &str| Command::new(name).arg("--version").stderr(Stdio::null()).stdout(Stdio::null()).status();
    match ["prometheus", "promtool"].iter().all(|name| found(name).is_ok_and(|status| status.success())) {
        true => None,
        false => Some("skipped: PromQL against a real Prometheus needs Debian's package: apt-get install prometheus"),
    }
}

impl Prometheus {
    /// Serves these samples, ten minutes of them at 10 s, to those who show `token`.
    pub fn start(token: &str, samples: &[Samples]) -> Self {
        Self::of(token, Server::start(samples))
    }

    fn of(token: &str, server: Server) -> Self {
        let shared = Arc::new(Mutex::new(Front { server: Arc::new(server), queries: Vec::new(), reply: None }));
        let front = HttpServer::start(None, {
            let (shared, token) = (Arc::clone(&shared), format!("Bearer {token}"));
            move |request| answer(request, &token, &shared)
        });
        Self { front, shared }
    }

    /// From now on these are the samples; what is being answered is answered out of those before.
    /// Serves what it scrapes every second at this address.
    pub fn scraping(token: &str, exporter: &str) -> Self {
        let config = format!(
            "scrape_configs: [{{ job_name: exporter, scrape_interval: 1s, honor_labels: true, \
             static_configs: [{{ targets: ['{exporter}'] }}] }}]"
        );
        Self::of(token, Server::with(&[], &config))
    }

    pub fn replace(&self, samples: &[Samples]) {
        let server = Arc::new(Server::start(samples));
        let _before = std::mem::replace(&mut lock(&self.shared).server, server);
    }

    /// As in `SDC_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.front.port())
    }

    /// Method and text of every query so far.
    pub fn queries(&self) -> Vec<(String, String)> {
        lock(&self.shared).queries.clone()
    }

    /// From now on this is the answer to everything; None for Prometheus' own.
    pub fn reply(&self, reply: Option<Reply>) {
        lock(&self.shared).reply = reply;
    }
}

impl Server {
    fn start(samples: &[Samples]) -> Self {
        Self::with(samples, "{}")
    }

    fn with(samples: &[Samples], config: &str) -> Self {
        let dir = TempDir::new();
        let data = dir.path().join("data");
        let file = dir.write("samples.txt", open_metrics(samples));
        let made = Command::new("promtool")
            .args(["tsdb", "create-blocks-from", "openmetrics"])
            .args([&file, &data])
            .output()
            .expect("promtool runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let config = dir.write("prometheus.yml", config);
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port").local_addr().expect("it").port();
        let log = std::fs::File::create(dir.path().join("log")).expect("a log file");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", data.display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .args(["--web.route-prefix=/prometheus", "--storage.tsdb.retention.time=3650d"])
            .stderr(log)
            .spawn()
            .expect("prometheus runs");
        let server = Self { child, base: format!("http://127.0.0.1:{port}"), _dir: dir };
        let ready = format!("{}/prometheus/-/ready", server.base);
        eventually("Prometheus is ready", START, || ureq::get(&ready).call().is_ok());
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Samples every 10 s, at times that 10 divides.
fn open_metrics(samples: &[Samples]) -> String {
    let mut text = String::new();
    let now = unix_now().div_euclid(STEP) * STEP;
    for Samples { series, first, step, newest } in samples {
        let last = now - newest;
        let times = (now - 600..=last).step_by(STEP as usize);
        for (index, time) in times.enumerate() {
            let value = first + step * index as f64;
            writeln!(text, "{series} {value} {time}").expect("a string takes text");
        }
    }
    text + "# EOF\n"
}

fn answer(request: &Request, token: &str, shared: &Mutex<Front>) -> Reply {
    if request.header("Authorization") != Some(token) {
        let path = request.route();
        return Reply::json(401, &json!({ "timestamp": 1, "status": 401, "error": "Unauthorized", "path": path }));
    }
    let path = request.route().strip_prefix("/prometheus/api/v1/").unwrap_or_default();
    if !matches!(path, "query" | "label/__name__/values") {
        let gone = path.starts_with("status/");
        return Reply::text(if gone { 410 } else { 404 }, "not found");
    }
    let body = String::from_utf8(request.body.clone()).expect("a form is text");
    let mut parameters = request.query();
    parameters.extend(crate::support::http::form(&body));
    let parameter = |name: &str| parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let mut front = lock(shared);
    if let Some(query) = parameter("query") {
        assert!(parameter("time").is_some(), "a query without its time has the time of who evaluates it");
        front.queries.push((request.method.clone(), query.clone()));
        let before = query.split("{kube_cluster_name").filter_map(|part| part.rsplit(['(', ' ']).next());
        let names: BTreeSet<&str> = before.take(query.matches("{kube_cluster_name").count()).collect();
        if names.len() > MOST_NAMES {
            return Reply::json(422, &json!({ "status": "error", "errorType": "execution", "error": "too many metrics" }));
        }
    }
    if let Some(reply) = &front.reply {
        return reply.clone();
    }
    let server = Arc::clone(&front.server);
    drop(front);
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let url = format!("{}{}", server.base, request.path);
    let answer = match request.method.as_str() {
        "POST" => agent.post(url).content_type("application/x-www-form-urlencoded").send(body),
        _ => agent.get(url).call(),
    };
    let mut answer = answer.expect("Prometheus answers");
    let text = answer.body_mut().read_to_vec().expect("a whole answer");
    Reply::typed(answer.status().as_u16(), "application/json", text)
}
