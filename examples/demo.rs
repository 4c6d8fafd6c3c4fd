//! An autoscaler follows a Sysdig metric, without a cluster and without an account.
//!
//! The adapter is the real program over real TLS. Sysdig and the Kubernetes API are the stand-ins of
//! the tests, which refuse what the real ones refuse. The autoscaler's formula is computed here.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, panic};

use support::client::SERVER_NAME;
use support::sysdig::Fault;
use support::{CERTIFICATE_SECRET, Client, HPA, HPA_GROUPS, METRIC, READ, Setup, TOKEN, poll};
use sysdig_metrics_adapter::tls::decode_base64;

const HELP: &str = "\
Shows how a HorizontalPodAutoscaler follows a metric of Sysdig Monitor through the adapter.

Usage: cargo run --release --example demo [-- OPTIONS]

  --outage        also show what happens when Sysdig fails, has no data, or revokes the token
  --stay          keep everything running at the end, to try requests by hand
  --fast          do not wait for the reader
  --adapter PATH  run this sysdig-metrics-adapter instead of the one compiled in
  --help          this text

NO_COLOR=1 and pipes get plain text. Exit code 1: the story did not hold.";

/// As in manifests/03-kuard-hpa.yml: pods, and requests per second.
const MIN: u64 = 3;
const MAX: u64 = 10;
const TARGET: u64 = 4;
/// Of the autoscaler, in seconds: between two looks, and how long a lower recommendation must last.
const SYNC: u64 = 15;
const STABILIZATION: u64 = 300;

type Story<T = ()> = Result<T, Box<dyn std::error::Error>>;

#[derive(Default)]
struct Options {
    adapter: Option<String>,
    fast: bool,
    outage: bool,
    stay: bool,
}

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1).peekable();
    if arguments.next_if(|word| word == "adapter").is_some() {
        return sysdig_metrics_adapter::run::run();
    }
    let mut options = Options::default();
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--outage" => options.outage = true,
            "--stay" => options.stay = true,
            "--fast" => options.fast = true,
            "--adapter" if arguments.peek().is_some() => options.adapter = arguments.next(),
            "--help" | "-h" => return end(writeln!(io::stdout(), "{HELP}").map_err(Into::into)),
            other => {
                let what = if other == "--adapter" { "needs a PATH" } else { "is not understood" };
                let _ = writeln!(io::stderr(), "demo: {other} {what}\n\n{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    panic::set_hook(Box::new(|_| {}));
    // The stand-ins and the harness say what is wrong as in a test: by a panic.
    let told = panic::catch_unwind(|| Demo::start(options).and_then(|mut demo| demo.story()));
    end(told.unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().map(String::as_str).or_else(|| cause.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("it ended early").into())
    }))
}

fn end(told: Story) -> ExitCode {
    let Err(error) = told else { return ExitCode::SUCCESS };
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    if matches!(kind, Some(ErrorKind::BrokenPipe | ErrorKind::Interrupted)) {
        return ExitCode::SUCCESS;
    }
    let _ = writeln!(io::stderr(), "demo: the story does not hold: {error}");
    ExitCode::FAILURE
}

struct Demo {
    setup: Setup,
    /// Trusts what the adapter published for itself, and shows the front proxy's certificate.
    aggregator: Client,
    options: Options,
    colour: bool,
    interrupted: Arc<AtomicBool>,
    /// Requests per second, of all pods together.
    load: f64,
    replicas: u64,
    /// Simulated seconds since the start.
    age: u64,
    /// When which number of replicas was recommended.
    recommended: Vec<(u64, u64)>,
    /// What was shown last, without its age.
    shown: String,
}

impl Demo {
    fn start(options: Options) -> Story<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        let own = env::current_exe()?;
        let setup = Setup::start(|| match &options.adapter {
            Some(path) => Command::new(path),
            None => {
                let mut command = Command::new(&own);
                command.arg("adapter");
                command
            }
        });
        let authority = setup.kubernetes.objects()[CERTIFICATE_SECRET]["data"]["ca.crt"].as_str().and_then(decode_base64);
        let authority = authority.ok_or("the adapter keeps no certificate authority")?;
        setup.dir.write("serving-ca.crt", &authority);
        let front_proxy = setup.front_proxy();
        front_proxy.write(setup.dir.path());
        let port = setup.adapter.port();
        let aggregator = Client::trusting(port, std::str::from_utf8(&authority)?, SERVER_NAME, Some(&front_proxy));
        // So that the metric is known to be collected in this cluster, without which nothing is 0.
        setup.deployment("default", "other", 1, &[(METRIC, 1.0)]);
        Ok(Self {
            setup,
            aggregator,
            options,
            colour: io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            interrupted,
            load: 0.0,
            replicas: MIN,
            age: 0,
            recommended: Vec::new(),
            shown: String::new(),
        })
    }

    fn story(&mut self) -> Story {
        self.say("The adapter runs, between stand-ins of Sysdig Monitor and of the Kubernetes API.")?;
        self.command(&format!("kubectl get --raw {READ}"))?;
        self.apply_load();
        writeln!(io::stdout(), "{}", self.aggregator.get_as(HPA, &HPA_GROUPS, READ).text())?;
        self.say("Three idle pods of kuard. Each shall handle 4 requests per second.")?;
        self.command("kubectl get hpa kuard-autoscaler -w")?;
        let head = ["NAME", "REFERENCE", "TARGETS", "MINPODS", "MAXPODS", "REPLICAS", "AGE"];
        writeln!(io::stdout(), "{}", columns(head))?;
        self.settle(2)?;
        self.expect("0", 3)?;
        self.say("24 requests per second come in, 8 for each of 3 pods: 3 × 8 ÷ 4 = 6 pods are needed.")?;
        self.act(24.0, "8", "4", 6)?;
        if self.options.outage {
            self.outage()?;
        }
        self.say("40 requests per second.")?;
        self.act(40.0, "6667m", "4", 10)?;
        self.say("The load ends. The autoscaler follows when fewer pods have been enough for five minutes.")?;
        self.act(0.0, "0", "0", 3)?;
        self.say("The story held; every value came from the adapter, over HTTPS.")?;
        if self.options.stay { self.stay() } else { Ok(()) }
    }

    /// Changes the load, and checks what the autoscaler sees at first and where it comes to rest.
    fn act(&mut self, load: f64, first: &str, last: &str, replicas: u64) -> Story {
        let before = self.replicas;
        self.load = load;
        let seen = self.sync()?;
        if seen.as_deref() != Ok(first) {
            return Err(format!("{load} requests/s over {before} pods are {first} per pod, not {seen:?}").into());
        }
        self.settle(STABILIZATION / SYNC + 2)?;
        self.expect(last, replicas)
    }

    fn settle(&mut self, syncs: u64) -> Story {
        (0..syncs).try_for_each(|_| self.sync().map(|_| ()))
    }

    fn expect(&mut self, value: &str, replicas: u64) -> Story {
        let before = self.replicas;
        let seen = self.sync()?;
        if (seen.as_deref(), before, self.replicas) == (Ok(value), replicas, replicas) {
            return Ok(());
        }
        Err(format!("{replicas} replicas at {value} were to come, not {} at {seen:?}", self.replicas).into())
    }

    fn apply_load(&self) {
        let each = self.load / self.replicas as f64;
        let metrics = if each > 0.0 { vec![(METRIC, each)] } else { Vec::new() };
        self.setup.deployment("default", "kuard", self.replicas as usize, &metrics);
    }

    /// What the autoscaler does every 15 seconds. Yields the value it saw, or why there is none.
    fn sync(&mut self) -> Story<Result<String, String>> {
        self.apply_load();
        let response = self.aggregator.get_as(HPA, &HPA_GROUPS, READ);
        let answer = response.json();
        let value = answer["items"][0]["value"].as_str().filter(|_| response.status == 200);
        let seen = match value {
            Some(value) => Ok(milli(value).ok_or("the value is no quantity")?),
            None => Err(answer["message"].as_str().unwrap_or("there is no message").to_owned()),
        };
        let shown = seen.clone().map(canonical);
        self.line(&format!("{}/{TARGET}", shown.as_deref().unwrap_or("<unknown>")))?;
        if let Ok(value) = seen {
            self.replicas = self.desired(value);
        }
        self.age += SYNC;
        self.pause()?;
        Ok(shown)
    }

    /// The formula of <https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details>,
    /// for a metric of type Object with a target of type Value; all pods count as ready at once.
    fn desired(&mut self, value: u64) -> u64 {
        let ratio = value as f64 / (TARGET * 1000) as f64;
        let replicas = self.replicas;
        let wanted = if (ratio - 1.0).abs() <= 0.1 { replicas } else { (ratio * replicas as f64).ceil() as u64 };
        let wanted = wanted.clamp(MIN, MAX);
        self.recommended.push((self.age, wanted));
        self.recommended.retain(|(at, _)| at + STABILIZATION > self.age);
        let highest = self.recommended.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted);
        if wanted < replicas { highest.min(replicas) } else { wanted }
    }

    fn outage(&mut self) -> Story {
        self.say("Sysdig fails in three ways. There is no value then, and the autoscaler holds its replicas.")?;
        let faults = [Some(Fault::Status(500)), Some(Fault::Empty), None];
        for (name, fault) in ["answers 500", "has no data", "revokes the token"].into_iter().zip(faults) {
            match fault {
                Some(fault) => self.setup.sysdig.fail(fault),
                None => self.setup.sysdig.set_token("another-token"),
            }
            for look in 0..2 {
                let Err(message) = self.sync()? else {
                    return Err(format!("there is a value although Sysdig {name}").into());
                };
                if look == 0 {
                    self.describe(&message)?;
                }
            }
            if self.replicas != 6 {
                return Err(format!("{} replicas when Sysdig {name}", self.replicas).into());
            }
            self.setup.sysdig.heal();
            self.setup.sysdig.set_token(TOKEN);
        }
        self.say("Sysdig works again.")?;
        self.settle(2)?;
        self.expect("4", 6)
    }

    /// As an event of `kubectl describe hpa` puts it.
    fn describe(&self, message: &str) -> Story {
        let what = format!("unable to get metric {METRIC}: Service on default kuard/unable to fetch metrics");
        Ok(writeln!(io::stdout(), "  Warning  FailedGetObjectMetric  {what} from custom metrics API: {message}")?)
    }

    fn stay(&self) -> Story {
        let (port, dir) = (self.setup.adapter.port(), self.setup.dir.path().display());
        self.say("Everything runs until Ctrl-C. Ask as the API server would, on behalf of the autoscaler:")?;
        self.command(&format!(
            "curl --resolve {SERVER_NAME}:{port}:127.0.0.1 --cacert {dir}/serving-ca.crt \\\n    --cert {dir}/tls.crt \
             --key {dir}/tls.key -H 'X-Remote-User: {HPA}' \\\n    https://{SERVER_NAME}:{port}{READ}"
        ))?;
        poll(Duration::from_secs(24 * 3600), || self.interrupted.load(Ordering::Relaxed).then_some(()));
        Ok(())
    }

    /// One line of `kubectl get hpa -w`, which shows changes only.
    fn line(&mut self, targets: &str) -> Story {
        let (min, max, replicas) = (MIN.to_string(), MAX.to_string(), self.replicas.to_string());
        let shown = format!("{targets} {replicas}");
        if self.shown != shown {
            let age = match self.age {
                seconds @ ..120 => format!("{seconds}s"),
                seconds => format!("{}m{}s", seconds / 60, seconds % 60),
            };
            let line = ["kuard-autoscaler", "Deployment/kuard", targets, &min, &max, &replicas, &age];
            writeln!(io::stdout(), "{}", columns(line))?;
            self.shown = shown;
        }
        Ok(())
    }

    fn say(&self, text: &str) -> Story {
        Ok(writeln!(io::stdout(), "\n# {text}")?)
    }

    fn command(&self, text: &str) -> Story {
        let (bold, plain) = if self.colour { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        Ok(writeln!(io::stdout(), "{bold}$ {text}{plain}")?)
    }

    /// Leaves the reader time.
    fn pause(&self) -> Story {
        let length = Duration::from_millis(if self.options.fast { 0 } else { 300 });
        match poll(length, || self.interrupted.load(Ordering::Relaxed).then_some(())) {
            Some(()) => Err(io::Error::from(ErrorKind::Interrupted).into()),
            None => Ok(()),
        }
    }
}

fn columns([name, reference, targets, min, max, replicas, age]: [&str; 7]) -> String {
    format!("{name:<19}{reference:<19}{targets:<14}{min:<10}{max:<10}{replicas:<11}{age}")
}

/// Thousandths, rounded up, of a quantity as the adapter writes it: the autoscaler computes with these.
fn milli(quantity: &str) -> Option<u64> {
    let (number, suffix) = quantity.split_at(quantity.bytes().take_while(u8::is_ascii_digit).count());
    let nanos = match suffix {
        "n" => 1,
        "u" => 1_000,
        "m" => 1_000_000,
        "" => 1_000_000_000,
        "k" => 1_000_000_000_000,
        _ => return None,
    };
    Some(number.parse::<u64>().ok()?.checked_mul(nanos)?.div_ceil(1_000_000))
}

fn canonical(milli: u64) -> String {
    if milli.is_multiple_of(1000) { (milli / 1000).to_string() } else { format!("{milli}m") }
}
