//! How fast the adapter answers and what it takes, measured over real TLS between the stand-ins of the tests.
//!
//! Client and stand-ins run on the same machine, so the figures are of all of them together.

#[path = "../tests/support/mod.rs"]
mod support;

use std::env;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::{Ca, Client, Connection, FRONT_PROXY, HPA, HPA_GROUPS, READ, Setup, Stage};

const DISCOVERY: &str = "/apis/custom.metrics.k8s.io/v1beta1";
const STARTS: usize = 7;
const READS: usize = 10_000;
const SLOW: usize = 1_000;
const FLOODERS: usize = 4;
const HELP: &str = "\
Measures the adapter between stand-ins of Sysdig Monitor and of the Kubernetes API, over TLS 1.3 with a
client certificate: starts, memory, and answers per second.

Usage: cargo run --release --example bench [-- OPTIONS]

  --hostile       instead: what a verified client notices of 1,000 slow connections and of floods
  --seconds N     length of each measurement (default: 5)
  --adapter PATH  measure this sysdig-metrics-adapter instead of the one compiled in
  --help          this text";

/// What it is, how many threads do it, and what each does again and again, given its number.
type Attack<'a> = (&'a str, usize, &'a (dyn Fn(usize) + Sync));
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

struct Bench {
    adapter: Option<String>,
    length: Duration,
}

/// Answers to one kind of request.
#[derive(Default)]
struct Sample {
    latencies: Vec<Duration>,
    failures: usize,
    length: Duration,
}

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1).peekable();
    if arguments.next_if(|word| word == "adapter").is_some() {
        return sysdig_metrics_adapter::run::run();
    }
    let mut bench = Bench { adapter: None, length: Duration::from_secs(5) };
    let mut hostile = false;
    while let Some(word) = arguments.next() {
        let value = arguments.peek().cloned();
        match (word.as_str(), value.as_deref().map(str::parse)) {
            ("--hostile", _) => hostile = true,
            ("--adapter", Some(_)) => bench.adapter = arguments.next(),
            ("--seconds", Some(Ok(seconds @ 1..=3600))) => {
                bench.length = Duration::from_secs(seconds);
                arguments.next();
            }
            ("--help" | "-h", _) => return end(writeln!(io::stdout(), "{HELP}").map_err(Into::into)),
            (other, _) => {
                let _ = writeln!(io::stderr(), "bench: {other} is not understood, or lacks its value\n\n{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    end(if hostile { bench.hostile() } else { bench.friendly() })
}

fn end(outcome: Outcome) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    let _ = writeln!(io::stderr(), "bench: {error}");
    ExitCode::FAILURE
}

impl Bench {
    fn command(&self) -> Outcome<Command> {
        if let Some(path) = &self.adapter {
            return Ok(Command::new(path));
        }
        let mut command = Command::new(env::current_exe()?);
        command.arg("adapter");
        Ok(command)
    }

    fn setup(&self) -> Outcome<(Setup, Duration)> {
        let (stage, command) = (Stage::new(), self.command()?);
        let started = Instant::now();
        let setup = stage.start(command, &[]);
        setup.adapter.wait_ready(&setup.client);
        Ok((setup, started.elapsed()))
    }

    fn friendly(&self) -> Outcome {
        let mut starts: Vec<Duration> = Vec::new();
        for _ in 0..STARTS {
            starts.push(self.setup()?.1);
        }
        starts.sort_unstable();
        say(&format!("exec to ready, median of {STARTS}: {:.0} ms", millis(starts[STARTS / 2])))?;
        let (setup, _) = self.setup()?;
        say(&format!("resident memory, idle: {:.1} MiB", mib(setup.adapter.rss_kib())))?;
        let mut connection = setup.client.connect();
        for _ in 0..READS {
            ask(&mut connection, READ)?;
        }
        say(&format!("resident memory after {READS} reads: {:.1} MiB", mib(setup.adapter.rss_kib())))?;
        say(&format!("\n{:<34}{:>6}{:>12}{:>12}{:>12}{:>10}", "", "conns", "answers/s", "p50", "p99", "failures"))?;
        for (name, path) in [("health", "/healthz"), ("discovery", DISCOVERY), ("read, asking Sysdig each time", READ)]
        {
            for connections in [1, 8] {
                let sample = self.measure(&setup.client, path, connections);
                say(&format!("{name:<34}{connections:>6}{}", sample.columns()))?;
            }
        }
        Ok(())
    }

    /// Asks over that many connections, which stay open, one request after the other on each.
    fn measure(&self, client: &Client, path: &str, connections: usize) -> Sample {
        let parts = thread::scope(|scope| {
            let clients: Vec<_> = (0..connections).map(|_| scope.spawn(|| self.keep_asking(client, path))).collect();
            clients.into_iter().map(|thread| thread.join().unwrap_or_default()).collect::<Vec<_>>()
        });
        let mut all = Sample { length: self.length, ..Sample::default() };
        for part in parts {
            all.latencies.extend(part.latencies);
            all.failures += part.failures;
        }
        all
    }

    fn keep_asking(&self, client: &Client, path: &str) -> Sample {
        let mut sample = Sample { length: self.length, ..Sample::default() };
        let mut connection = client.connect();
        let started = Instant::now();
        while started.elapsed() < self.length {
            let asked = Instant::now();
            match ask(&mut connection, path) {
                Ok(()) => sample.latencies.push(asked.elapsed()),
                Err(_) => {
                    sample.failures += 1;
                    if let Ok(new) = client.try_connect() {
                        connection = new;
                    }
                }
            }
        }
        sample
    }

    /// A connection for every request, as after a restart of the API server.
    fn keep_connecting(&self, client: &Client, path: &str) -> Sample {
        let mut sample = Sample { length: self.length, ..Sample::default() };
        let started = Instant::now();
        while started.elapsed() < self.length {
            let asked = Instant::now();
            let answered = client.try_connect().map_err(Into::into).and_then(|mut it| ask(&mut it, path));
            match answered {
                Ok(()) => sample.latencies.push(asked.elapsed()),
                Err(_) => sample.failures += 1,
            }
        }
        sample
    }

    fn hostile(&self) -> Outcome {
        let (setup, _) = self.setup()?;
        let rogue = Client::new(setup.adapter.port(), Some(&Ca::new("rogue").issue_client(FRONT_PROXY, &[])));
        let anonymous = Client::new(setup.adapter.port(), None);
        // A thread for each connection comes on top.
        let own = setup.adapter.threads();
        let stop = AtomicBool::new(false);
        let opened = AtomicUsize::new(0);
        let going = || !stop.load(Ordering::Relaxed);
        let count = || opened.fetch_add(1, Ordering::Relaxed);
        let nothing = |_: usize| thread::sleep(Duration::from_millis(100));
        let slow = |index: usize| {
            let _ = hold(&anonymous, index % 3, going, count);
            // Slow, and no flood when it is closed for a new one.
            (0..10).take_while(|_| going()).for_each(|_| thread::sleep(Duration::from_millis(100)));
        };
        let handshakes = |_: usize| {
            let _ = rogue.try_connect().map(|_| count());
        };
        let headers = |_: usize| {
            let flood = format!("GET / HTTP/1.1\r\nHost: a\r\n{}", "X-Flood: 0123456789abcdef\r\n".repeat(2000));
            let _ = anonymous.try_connect().and_then(|mut it| it.try_send_raw(flood).map(|()| count()));
        };
        let attacks: [Attack<'_>; 4] = [
            ("nobody else", 1, &nothing),
            ("1,000 slow connections", SLOW, &slow),
            ("a flood of handshakes", FLOODERS, &handshakes),
            ("a flood of headers", FLOODERS, &headers),
        ];
        say("A verified client reads, over a connection that stays and over a new one for each read, beside …\n")?;
        say(&format!(
            "{:<40}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}{:>10}",
            "", "answers/s", "p50", "p99", "failures", "attempts", "held", "peak MiB"
        ))?;
        for (name, threads, attack) in attacks {
            stop.store(false, Ordering::Relaxed);
            opened.store(0, Ordering::Relaxed);
            let (kept, fresh, held) = thread::scope(|scope| {
                for index in 0..threads {
                    thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, move || {
                        while going() {
                            attack(index);
                        }
                    })?;
                }
                // Until every place is taken.
                thread::sleep(Duration::from_secs(2));
                let kept = scope.spawn(|| self.keep_asking(&setup.client, READ));
                let fresh = scope.spawn(|| self.keep_connecting(&setup.client, READ));
                thread::sleep(self.length / 2);
                let held = setup.adapter.threads().saturating_sub(own);
                let samples = (kept.join().unwrap_or_default(), fresh.join().unwrap_or_default(), held);
                stop.store(true, Ordering::Relaxed);
                Ok::<_, io::Error>(samples)
            })?;
            let (attempts, peak) = (opened.load(Ordering::Relaxed), mib(setup.adapter.peak_kib()));
            let shared = format!("{attempts:>10}{held:>10}{peak:>10.1}");
            say(&format!("{:<40}{}{shared}", format!("{name}: kept"), kept.columns()))?;
            say(&format!("{:<40}{}", format!("{name}: new"), fresh.columns()))?;
        }
        say("\nheld: connections of others that the adapter held at half time")
    }
}

/// One connection that goes on as slowly as it may: silent, silent after the handshake, or sending
/// a head byte by byte. Returns when the adapter has closed it.
fn hold(client: &Client, kind: usize, going: impl Fn() -> bool, count: impl Fn() -> usize) -> io::Result<()> {
    if kind == 0 {
        let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, client.port()))?;
        tcp.set_read_timeout(Some(Duration::from_millis(200)))?;
        count();
        while going() && tcp.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {}
        return Ok(());
    }
    let mut connection = client.try_connect()?;
    count();
    while going() && !connection.closed_within(Duration::from_millis(500)) {
        if kind == 2 {
            connection.try_send_raw("G")?;
        }
    }
    Ok(())
}

fn ask(connection: &mut Connection, path: &str) -> Outcome {
    let groups = HPA_GROUPS.map(|group| ("X-Remote-Group", group));
    let headers: Vec<_> = [("X-Remote-User", HPA)].into_iter().chain(groups).collect();
    let response = connection.try_request("GET", path, &headers)?;
    if response.status == 200 { Ok(()) } else { Err(response.text().into()) }
}

impl Sample {
    fn columns(mut self) -> String {
        self.latencies.sort_unstable();
        let at = |percent: usize| {
            let index = (self.latencies.len() * percent / 100).min(self.latencies.len().saturating_sub(1));
            self.latencies.get(index).copied().map_or(f64::NAN, millis)
        };
        let rate = self.latencies.len() as f64 / self.length.as_secs_f64();
        format!("{rate:>12.0}{:>9.3} ms{:>9.3} ms{:>10}", at(50), at(99), self.failures)
    }
}

fn millis(length: Duration) -> f64 {
    length.as_secs_f64() * 1000.0
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn say(line: &str) -> Outcome {
    Ok(writeln!(io::stdout(), "{line}")?)
}
