//! The real binary as a child process.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs};

use super::client::Client;
use super::clock::poll;
use super::http::lock;

const PATIENCE: Duration = Duration::from_secs(10);
const LISTENING: &str = "listening on 127.0.0.1:";

/// A running adapter; killed when dropped.
#[derive(Debug)]
pub struct Adapter {
    child: Mutex<Child>,
    pid: u32,
    port: u16,
    log: Arc<Mutex<String>>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl Adapter {
    /// Starts the binary on a free port of the loopback address and waits until it listens.
    /// Of this process's environment it inherits PATH only.
    #[track_caller]
    pub fn start(command: Command, env: &[(&str, String)]) -> Self {
        let mut adapter = Self::spawn(command, env);
        let port = poll(PATIENCE, || match adapter.exit_status() {
            Some(status) => panic!("the adapter ended with {status}:\n{}", adapter.log()),
            None => adapter.listening_port(),
        });
        adapter.port = port.unwrap_or_else(|| panic!("the adapter does not listen:\n{}", adapter.log()));
        adapter
    }

    /// Starts the binary, for those that are to fail. Its port is not known.
    pub fn spawn(mut command: Command, env: &[(&str, String)]) -> Self {
        command.env_clear().envs(env::var_os("PATH").map(|path| ("PATH", path)));
        command.env("LISTEN_ADDR", "127.0.0.1:0").envs(env.iter().map(|(name, value)| (*name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary is there and can be started");
        let stderr = child.stderr.take().expect("stderr is piped");
        let log = Arc::new(Mutex::new(String::new()));
        let reader = thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                    let mut log = lock(&log);
                    log.push_str(&String::from_utf8_lossy(&line));
                    log.push('\n');
                }
            }
        });
        let pid = child.id();
        Self { child: Mutex::new(child), pid, port: 0, log, reader: Mutex::new(Some(reader)) }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        lock(&self.log).clone()
    }

    /// Waits until `/readyz` answers 200.
    #[track_caller]
    pub fn wait_ready(&self, client: &Client) {
        let is_ready = || client.try_request("GET", "/readyz", &[]).is_ok_and(|response| response.status == 200);
        let ready = poll(PATIENCE, || is_ready().then_some(()));
        assert!(ready.is_some(), "the adapter does not get ready:\n{}", self.log());
    }

    /// Waits for a line of the log that holds `text`.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        let found = poll(PATIENCE, || self.log().contains(text).then_some(()));
        assert!(found.is_some(), "the adapter does not log {text:?}:\n{}", self.log());
    }

    /// Asks it to end, as kubelet does.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal by its name without SIG.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid.to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "SIG{name} cannot be sent");
    }

    /// How it ended, with its log complete; None if it is still there after `patience`.
    pub fn wait_exit(&self, patience: Duration) -> Option<ExitStatus> {
        let status = poll(patience, || self.exit_status())?;
        if let Some(reader) = lock(&self.reader).take() {
            let _ = reader.join();
        }
        Some(status)
    }

    /// Resident memory.
    pub fn rss_kib(&self) -> u64 {
        self.status_number("VmRSS:").expect("a running process has memory")
    }

    /// The most resident memory there ever was.
    pub fn peak_kib(&self) -> u64 {
        self.status_number("VmHWM:").expect("a running process has memory")
    }

    pub fn threads(&self) -> u64 {
        self.status_number("Threads:").expect("a running process has threads")
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("the process is running").count()
    }

    fn status_number(&self, key: &str) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    }

    fn exit_status(&self) -> Option<ExitStatus> {
        lock(&self.child).try_wait().expect("the child is ours")
    }

    fn listening_port(&self) -> Option<u16> {
        let log = lock(&self.log);
        let (_, rest) = log.split_once(LISTENING)?;
        rest.lines().next()?.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
    }
}

impl Drop for Adapter {
    #[expect(clippy::print_stderr, reason = "the test harness shows it with the test that failed")]
    fn drop(&mut self) {
        {
            let mut child = lock(&self.child);
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(reader) = lock(&self.reader).take() {
            let _ = reader.join();
        }
        if thread::panicking() {
            eprintln!("log of the adapter:\n{}", self.log());
        }
    }
}
