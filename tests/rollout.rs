//! A rolling update while reads go on: none of them fails. The adapters stand behind a switch of TCP connections, as
//! pods stand behind a Service.

mod support;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use support::http::lock;
use support::sysdig::Series;
use support::{Adapter, Client, Connection, HPA, HPA_GROUPS, METRIC, READ, Response, Setup, Stage, eventually};

const SOON: Duration = Duration::from_secs(15);
/// What Kubernetes gives a pod to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// An update goes on once so many connections more have been led; few, as the adapter that ends answers for 5 s only.
const SOME: u64 = 3;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// Leads each connection to the next of its ports, and tries no other if that one refuses.
struct Switch {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    ports: Mutex<Vec<u16>>,
    /// How many connections each port has got.
    led: Mutex<BTreeMap<u16, u64>>,
    ending: AtomicBool,
}

impl Switch {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (port, shared) = (listener.local_addr().unwrap().port(), Arc::<Shared>::default());
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for (turn, near) in listener.incoming().map_while(Result::ok).enumerate() {
                    if shared.ending.load(Ordering::Relaxed) {
                        break;
                    }
                    // A client sees the end of its connection where the port refuses.
                    let _ = shared.lead(near, turn);
                }
            }
        });
        Self { port, shared }
    }

    fn add(&self, adapter: &Adapter) {
        lock(&self.shared.ports).push(adapter.port());
    }

    /// New connections do not go there any more; those that there are stay.
    fn remove(&self, adapter: &Adapter) {
        lock(&self.shared.ports).retain(|port| *port != adapter.port());
    }

    /// Waits until this one has got some more connections.
    #[track_caller]
    fn until_used(&self, adapter: &Adapter) {
        let led = || lock(&self.shared.led).get(&adapter.port()).copied().unwrap_or_default();
        let before = led();
        eventually("connections are led to the adapter", SOON, || led() >= before + SOME);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

impl Shared {
    fn lead(&self, near: TcpStream, turn: usize) -> io::Result<()> {
        let port = {
            let ports = lock(&self.ports);
            ports[turn % ports.len()]
        };
        let far = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        *lock(&self.led).entry(port).or_default() += 1;
        for (mut from, mut to) in [(near.try_clone()?, far.try_clone()?), (far, near)] {
            from.set_nodelay(true)?;
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
        Ok(())
    }
}

/// Reads until `end`, over one connection for as long as the adapter keeps it if that is `kept`. Yields how many were
/// answered, and what became of the others.
fn read_on(client: &Client, kept: bool, end: &AtomicBool) -> (u64, Vec<String>) {
    let (mut answered, mut failed, mut connection) = (0, Vec::new(), None);
    while !end.load(Ordering::Relaxed) {
        let result = read(client, &mut connection);
        let last = |response: &Response| response.header("connection").is_some_and(|it| it.eq_ignore_ascii_case("close"));
        if !kept || result.as_ref().map_or(true, last) {
            connection = None;
        }
        match result {
            Ok(response) if response.status == 200 => answered += 1,
            Ok(response) => failed.push(response.text()),
            Err(error) => failed.push(error.to_string()),
        }
    }
    (answered, failed)
}

fn read(client: &Client, connection: &mut Option<Connection>) -> io::Result<Response> {
    if connection.is_none() {
        *connection = Some(client.try_connect()?);
    }
    let connection = connection.as_mut().expect("it is there now");
    let groups = HPA_GROUPS.map(|group| ("X-Remote-Group", group));
    let headers: Vec<_> = [("X-Remote-User", HPA)].into_iter().chain(groups).collect();
    connection.try_request("GET", READ, &headers)
}

/// Replaces both adapters one after the other, as a Deployment with `maxUnavailable: 0` does.
fn update(overrides: &[(&'static str, String)], latency: Duration) {
    let setup = Stage::new().start(binary(), overrides);
    setup.adapter.wait_ready(&setup.client);
    setup.sysdig.delay(latency);
    let mut environment = setup.env();
    environment.retain(|(name, _)| overrides.iter().all(|(other, _)| other != name));
    environment.extend(overrides.iter().cloned());
    let start = || {
        let adapter = Adapter::start(binary(), &environment);
        adapter.wait_ready(&Client::new(adapter.port(), Some(&setup.front_proxy())));
        adapter
    };
    let (second, switch, end) = (start(), Switch::start(), AtomicBool::new(false));
    let olds = [&setup.adapter, &second];
    olds.iter().for_each(|adapter| switch.add(adapter));
    let client = Client::new(switch.port, Some(&setup.front_proxy()));
    thread::scope(|scope| {
        let reader = |kept| {
            scope.spawn({
                let (client, end) = (&client, &end);
                move || read_on(client, kept, end)
            })
        };
        let readers = [false, false, true, true].map(reader);
        // Readers end whatever happens here.
        let updated = scope.spawn(|| {
            let mut news = Vec::new();
            for old in olds {
                switch.until_used(old);
                let new = start();
                switch.add(&new);
                switch.until_used(&new);
                old.terminate();
                let unready = || client_of(&setup, old).get("/readyz").status == 503;
                eventually("it is not ready any more", SOON, unready);
                // Until every node has heard of that.
                switch.until_used(old);
                switch.remove(old);
                let status = old.wait_exit(PATIENCE).expect("it ends in time");
                assert!(status.success(), "{status}:\n{}", old.log());
                switch.until_used(&new);
                news.push(new);
            }
            news
        });
        let news = updated.join();
        end.store(true, Ordering::Relaxed);
        let mut answered = 0;
        for reader in readers {
            let (count, failed) = reader.join().unwrap();
            assert!(failed.is_empty(), "{} failed beside {count}: {}", failed.len(), failed[0]);
            answered += count;
        }
        assert_eq!(news.unwrap().len(), 2);
        assert!(answered > 8 * SOME, "{answered}");
    });
}

fn client_of(setup: &Setup, adapter: &Adapter) -> Client {
    Client::new(adapter.port(), Some(&setup.front_proxy()))
}

#[test]
fn a_rolling_update_loses_no_read_that_is_answered_from_memory() {
    update(&[("REFRESH_INTERVAL", "10s".to_owned())], Duration::ZERO);
}

#[test]
fn a_rolling_update_loses_no_read_that_waits_for_sysdig() {
    update(&[("REFRESH_INTERVAL", "0s".to_owned())], Duration::from_millis(100));
}

#[test]
fn two_replicas_ask_the_same_question_and_give_the_same_answer() {
    let setup = Stage::new().start(binary(), &[("REFRESH_INTERVAL", "0s".to_owned())]);
    // What a sum over these comes to depends on where the window ends.
    let until_unix = setup.sysdig.world().newest();
    let series = Series::Since { value: 7.0, from_unix: until_unix - 40, until_unix };
    setup.sysdig.world().set("default", "kuard", METRIC, series);
    let mut environment = setup.env();
    environment.push(("REFRESH_INTERVAL", "0s".to_owned()));
    let second = Adapter::start(binary(), &environment);
    let clients = [client_of(&setup, &setup.adapter), client_of(&setup, &second)];
    let path = format!("{READ}?metricLabelSelector=sysdig%2Ftime-aggregation%3Dsum");
    let read = |client: &Client| {
        let response = client.get_as(HPA, &HPA_GROUPS, &path);
        assert_eq!(response.status, 200, "{}", response.text());
        response.json()["items"][0].clone()
    };
    // A step may end between the two.
    let (asked, answers) = (0..20)
        .find_map(|_| {
            let before = setup.sysdig.queries().len();
            let answers = clients.each_ref().map(read);
            let asked = setup.sysdig.queries().split_off(before);
            (answers[0]["timestamp"] == answers[1]["timestamp"]).then_some((asked, answers))
        })
        .expect("steps are longer than two reads");
    assert_eq!(answers[0], answers[1]);
    assert_eq!(asked.len(), 2, "{asked:#?}");
    assert_eq!(asked[0], asked[1]);
    assert_eq!(asked[0]["end"].as_u64().unwrap() % 10, 0);
}
