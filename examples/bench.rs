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

use support::{Ca, Client, Connection, FRONT_PROXY, HPA, HPA_GROUPS, METRIC, READ, Setup, Stage};

const DISCOVERY: &str = "/apis/custom.metrics.k8s.io/v1beta1";
const STARTS: usize = 7;
const MANY_READS: usize = 1_000_000;
const HPAS: usize = 1_000;
const PERIOD: Duration = Duration::from_secs(15);
const OBJECTS: usize = 10_000;
const SLOW_HPAS: usize = 130;
const METRICS: usize = 10_000;
const SLOW: usize = 1_000;
const FLOODERS: usize = 4;
const HELP: &str = "\
Measures the adapter between stand-ins of Sysdig Monitor and of the Kubernetes API, over TLS 1.3 with a
client certificate: starts, memory, and answers per second.

Usage: cargo run --release --example bench [-- OPTIONS]

  --hostile       instead: what a verified client notices of 1,000 slow connections and of floods
  --write         write what was measured to docs/performance.md, too (about six minutes)
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
    let (mut hostile, mut write) = (false, false);
    while let Some(word) = arguments.next() {
        let value = arguments.peek().cloned();
        match (word.as_str(), value.as_deref().map(str::parse)) {
            ("--hostile", _) => hostile = true,
            ("--write", _) => write = true,
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
    end(if hostile { bench.hostile() } else { bench.friendly(write) })
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
        self.setup_with(Stage::new(), &[("REFRESH_INTERVAL", "10s".to_owned())])
    }

    fn setup_with(&self, stage: Stage, settings: &[(&str, String)]) -> Outcome<(Setup, Duration)> {
        let (command, started) = (self.command()?, Instant::now());
        let setup = stage.start(command, settings);
        setup.adapter.wait_ready(&setup.client);
        Ok((setup, started.elapsed()))
    }

    /// What the documentation shows, as a table of Markdown.
    fn friendly(&self, write: bool) -> Outcome {
        let mut table = Table(vec!["| what | goal | measured |".to_owned(), "|---|---|---|".to_owned()]);
        let mut starts = (0..STARTS).map(|_| Ok(self.setup()?.1)).collect::<Outcome<Vec<Duration>>>()?;
        starts.sort_unstable();
        table.row("exec to ready, median of 7", "100 ms", &format!("{:.0} ms", millis(starts[STARTS / 2])))?;
        self.reads(&mut table)?;
        self.one_metric(&mut table)?;
        self.many_objects(&mut table)?;
        self.slow_sysdig(&mut table)?;
        self.many_metrics(&mut table)?;
        if write { table.write() } else { Ok(()) }
    }

    fn reads(&self, table: &mut Table) -> Outcome {
        let (setup, _) = self.setup()?;
        let idle = cpu(&setup);
        thread::sleep(self.length * 4);
        let share = (cpu(&setup) - idle).as_secs_f64() / (self.length * 4).as_secs_f64() * 100.0;
        table.row("CPU while idle", "0.1 %", &format!("{share:.2} %"))?;
        let memory = mib(setup.adapter.rss_kib());
        table.row("resident memory, idle", "10 MiB", &format!("{memory:.1} MiB"))?;
        let mut connection = setup.client.connect();
        for _ in 0..2 {
            ask(&mut connection, READ)?;
        }
        let mut p50 = Vec::new();
        for (name, path, goals) in [
            ("bare door (`/healthz`)", "/healthz", ["", ""]),
            ("discovery", DISCOVERY, ["", ""]),
            ("warm read", READ, ["p50 0.15 ms", "15,000/s, p99 2 ms"]),
        ] {
            for (connections, goal) in [1, 8].into_iter().zip(goals) {
                let before = cpu(&setup);
                let sample = self.measure(&setup.client, path, connections);
                let per_thousand = (cpu(&setup) - before).as_secs_f64() * 1e6 / sample.latencies.len().max(1) as f64;
                p50.push(sample.at(50.0));
                let found = format!("{}, {per_thousand:.0} ms of CPU per 1,000", sample.words());
                table.row(
                    &format!("{name}, {connections} connection{}", if connections > 1 { "s" } else { "" }),
                    goal,
                    &found,
                )?;
            }
        }
        let ratios = format!("{:.2} and {:.2} times", p50[4] / p50[0], p50[5] / p50[1]);
        table.row("warm read against the bare door, p50, 1 and 8", "1.5 times", &ratios)?;
        let start = setup.adapter.rss_kib();
        let reads = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| self.ask_many(&setup.client, MANY_READS / 8))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum::<usize>()
        });
        let grown = mib(setup.adapter.rss_kib()) - mib(start);
        table.row(&format!("memory after {reads} more reads"), "flat", &format!("{grown:+.1} MiB"))
    }

    /// 1,000 HPAs with one metric, each of another Service in one of four namespaces, every 15 s.
    fn one_metric(&self, table: &mut Table) -> Outcome {
        let stage = Stage::new();
        let place = |index: usize| (format!("team-{}", index % 4), format!("app-{index}"));
        for index in 0..HPAS {
            let (namespace, name) = place(index);
            stage.deployment(&namespace, &name, 1, &[(METRIC, 5.0)]);
        }
        let (setup, _) = self.setup_with(stage, &[("REFRESH_INTERVAL", "10s".to_owned())])?;
        let paths: Vec<String> = (0..HPAS).map(place).map(|(namespace, name)| object(&namespace, &name, METRIC)).collect();
        let round = || -> Outcome {
            let (mut connection, started) = (setup.client.connect(), Instant::now());
            for path in &paths {
                ask(&mut connection, path)?;
            }
            thread::sleep(PERIOD.saturating_sub(started.elapsed()));
            Ok(())
        };
        round()?;
        round()?;
        let (queries, calls, used) = (setup.sysdig.queries().len(), setup.kubernetes.requests().len(), cpu(&setup));
        for _ in 0..4 {
            round()?;
        }
        let queries = setup.sysdig.queries().len() - queries;
        let calls = setup.kubernetes.requests().len() - calls;
        let used = (cpu(&setup) - used).as_secs_f64() / 60.0 * 100.0;
        table.row("1,000 HPAs over one metric, 15 s: queries to Sysdig a minute", "7", &queries.to_string())?;
        table.row("… calls to the Kubernetes API a minute", "10", &calls.to_string())?;
        table.row("… CPU", "", &format!("{used:.2} % of a core"))?;
        table.row("… resident memory", "", &format!("{:.1} MiB", mib(setup.adapter.rss_kib())))
    }

    fn many_objects(&self, table: &mut Table) -> Outcome {
        let stage = Stage::new();
        for index in 0..OBJECTS {
            stage.deployment("default", &format!("app-{index}"), 1, &[(METRIC, 5.0)]);
        }
        let (setup, _) = self.setup_with(stage, &[("REFRESH_INTERVAL", "10s".to_owned()), ("SDC_TIMEOUT", "30s".to_owned())])?;
        let mut connection = setup.client.connect();
        for _ in 0..2 {
            ask(&mut connection, &object("default", "*", METRIC))?;
        }
        let refreshes = || setup.sysdig.queries().iter().filter(|query| query["paging"]["from"] == 0).count();
        let (before, used) = (refreshes(), cpu(&setup));
        thread::sleep(Duration::from_secs(60));
        let cost = millis(cpu(&setup) - used) / (refreshes() - before).max(1) as f64;
        table.row("10,000 objects: resident memory", "24 MiB", &format!("{:.1} MiB", mib(setup.adapter.rss_kib())))?;
        table.row("… CPU of a refresh", "100 ms", &format!("{cost:.0} ms"))
    }

    /// 130 HPAs, each with a metric of its own, while Sysdig takes 5 s for a query; beside one that is warm.
    fn slow_sysdig(&self, table: &mut Table) -> Outcome {
        let stage = Stage::new();
        for index in 0..SLOW_HPAS {
            stage.sysdig.world().describe(&format!("slow.metric.{index}"), "gauge");
        }
        let (setup, _) = self.setup_with(stage, &[("REFRESH_INTERVAL", "10s".to_owned()), ("SDC_TIMEOUT", "10s".to_owned())])?;
        let mut connection = setup.client.connect();
        for _ in 0..2 {
            ask(&mut connection, READ)?;
        }
        let quiet = self.measure(&setup.client, READ, 1);
        setup.sysdig.delay(Duration::from_secs(5));
        let stop = AtomicBool::new(false);
        let beside = thread::scope(|scope| {
            for index in 0..SLOW_HPAS {
                let (setup, stop) = (&setup, &stop);
                scope.spawn(move || {
                    let path = object("default", "kuard", &format!("slow.metric.{index}"));
                    while !stop.load(Ordering::Relaxed) {
                        let _ = setup.client.try_connect().map(|mut it| ask(&mut it, &path));
                        thread::sleep(Duration::from_millis(500));
                    }
                });
            }
            thread::sleep(Duration::from_secs(1));
            let beside = self.measure(&setup.client, READ, 1);
            stop.store(true, Ordering::Relaxed);
            setup.sysdig.delay(Duration::ZERO);
            beside
        });
        let found = format!("{} beside, {} alone", beside.words(), quiet.words());
        table.row("warm read beside 130 HPAs whose queries take 5 s", "p99 unchanged", &found)
    }

    fn many_metrics(&self, table: &mut Table) -> Outcome {
        let (setup, _) = self.setup()?;
        let mut connection = setup.client.connect();
        for _ in 0..2 {
            ask(&mut connection, READ)?;
        }
        let mut memory = Vec::new();
        for part in 0..2 {
            for index in 0..METRICS / 2 {
                // Sysdig does not know them, which makes no difference to what is remembered.
                let path = object("default", "kuard", &format!("once.{part}.{index}"));
                let _ = ask(&mut connection, &path);
            }
            memory.push(mib(setup.adapter.rss_kib()));
        }
        let found = format!("{:.1} MiB after 5,000, {:.1} MiB after 10,000", memory[0], memory[1]);
        table.row("10,000 metrics asked for once: resident memory", "flat", &found)
    }

    fn ask_many(&self, client: &Client, count: usize) -> usize {
        let mut connection = client.connect();
        (0..count)
            .filter(|_| {
                let answered = ask(&mut connection, READ).is_ok();
                if !answered && let Ok(new) = client.try_connect() {
                    connection = new;
                }
                answered
            })
            .count()
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
    /// The latency, in milliseconds, within which that share of the requests was answered.
    fn at(&self, percent: f64) -> f64 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let index = (sorted.len() as f64 * percent / 100.0) as usize;
        sorted.get(index.min(sorted.len().saturating_sub(1))).copied().map_or(f64::NAN, millis)
    }

    fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.length.as_secs_f64()
    }

    fn words(&self) -> String {
        let [p50, p99, p999] = [50.0, 99.0, 99.9].map(|percent| self.at(percent));
        let failures = if self.failures > 0 { format!(", {} failures", self.failures) } else { String::new() };
        format!("{:.0}/s, p50 {p50:.3} ms, p99 {p99:.3} ms, p99.9 {p999:.3} ms{failures}", self.rate())
    }

    fn columns(&self) -> String {
        let (p50, p99) = (self.at(50.0), self.at(99.0));
        format!("{:>12.0}{p50:>9.3} ms{p99:>9.3} ms{:>10}", self.rate(), self.failures)
    }
}

/// Lines of Markdown, each shown as soon as it is there.
struct Table(Vec<String>);

impl Table {
    fn row(&mut self, what: &str, goal: &str, measured: &str) -> Outcome {
        self.0.push(format!("| {what} | {goal} | {measured} |"));
        say(&format!("{what}: {measured}{}", if goal.is_empty() { String::new() } else { format!(" (goal: {goal})") }))
    }

    /// Between the two lines that mark its place in the document.
    fn write(&self) -> Outcome {
        const PLACE: &str = "docs/performance.md";
        let (begin, end) = ("<!-- measured -->\n", "<!-- end -->");
        let text = std::fs::read_to_string(PLACE)?;
        let (head, rest) = text.split_once(begin).ok_or("docs/performance.md has lost its mark")?;
        let (_, tail) = rest.split_once(end).ok_or("docs/performance.md has lost its second mark")?;
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let cores = thread::available_parallelism()?;
        let machine =
            format!("{cores} cores of {}, client and stand-ins on the same machine", cpu.trim_start_matches([' ', '\t', ':']));
        Ok(std::fs::write(PLACE, format!("{head}{begin}{machine}\n\n{}\n{end}{tail}", self.0.join("\n")))?)
    }
}

/// User and system time that the adapter has used.
fn cpu(setup: &Setup) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", setup.adapter.pid())).unwrap_or_default();
    let fields: Vec<u64> = stat.rsplit(')').next().unwrap_or_default().split(' ').filter_map(|it| it.parse().ok()).collect();
    // Ticks of 10 ms.
    fields.get(10..12).map_or(Duration::ZERO, |ticks| Duration::from_millis(ticks.iter().sum::<u64>() * 10))
}

fn object(namespace: &str, name: &str, metric: &str) -> String {
    format!("/apis/custom.metrics.k8s.io/v1beta2/namespaces/{namespace}/services/{name}/{metric}")
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
