//! The life of the process: settings, start, work, drain, end.

use crate::error::{Reason, refusal};
use crate::handler::{Class, Handler, resource_lists};
use crate::tls::{Serving, certified_key, server_config};
use crate::{auth::Auth, certs::Keeper, changes::Changes, config::Config, connections::Connections, door::Door};
use crate::{kube::Kube, readings::Readings, requestheader::Trust, server, sysdig::Sysdig, timestamp};
use signal_hook::{consts, flag};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock, atomic::AtomicBool, atomic::Ordering};
use std::{env, fs, process::ExitCode, thread, time::Duration};

const PORT: u16 = 10250;
/// Kubernetes goes on sending requests to an ending pod until every node knows that it ends.
const GRACE: Duration = Duration::from_secs(5);
/// For answers under way; together with [`GRACE`] well within the 30 s that Kubernetes gives.
const PATIENCE: Duration = Duration::from_secs(15);
/// Of connections, so that replicas share the load.
const AGE: Duration = Duration::from_secs(600);
/// Of a request under way: the connection, the door's side of the inner connection, and two of tiny_http's.
const DESCRIPTORS: usize = 4;
const SPARE_DESCRIPTORS: usize = 64;
const MOST_CONNECTIONS: usize = 512;

/// Runs the adapter until it is told to end. 2 means that a setting is wrong, 1 that the start failed.
pub fn run() -> ExitCode {
    start_log();
    let variable = |name: &str| Some(env::var_os(name)?.into_string().map_err(|_| "is not UTF-8".to_owned()));
    let done = Config::read(variable).map_err(|mistakes| (2, mistakes)).and_then(|config| {
        let sysdig = Sysdig::new(&config).map_err(|mistake| (2, vec![mistake]))?;
        work(&config, sysdig).map_err(|mistake| (1, vec![mistake]))
    });
    let Err((code, mistakes)) = done else { return ExitCode::SUCCESS };
    mistakes.iter().for_each(|mistake| log::error!("{mistake}"));
    ExitCode::from(code)
}

/// Control characters are escaped, so that nothing from outside can start a line of its own.
fn start_log() {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    log.format(|out, record| {
        let text: String = record.args().to_string().chars().map(visible).collect();
        writeln!(out, "{} {} {text}", timestamp::rfc3339(timestamp::unix_now()), record.level())
    });
    log.init();
}

fn visible(c: char) -> String {
    if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
}

fn work(config: &Config, sysdig: Sysdig) -> Result<(), String> {
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGTERM, consts::SIGINT] {
        // A second signal ends at once.
        flag::register_conditional_shutdown(signal, 1, ending.clone()).map_err(|error| error.to_string())?;
        flag::register(signal, ending.clone()).map_err(|error| error.to_string())?;
    }
    let (kube, sysdig, changes) = (Arc::new(Kube::new(config)), Arc::new(sysdig), Arc::new(Changes::default()));
    let (auth, trust) = (Auth::start(kube.clone()), Arc::new(Trust::default()));
    let readings = Readings::new(config, kube.clone(), sysdig.clone(), changes.clone());
    let serving = serve_certificate(config, &kube, &changes)?;
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let connections = Arc::new(Connections::new(capacity(&limits)));
    let resources = RwLock::new(resource_lists(&[]));
    let handler = Arc::new(Handler { auth, readings, trust, serving, connections, resources });
    let (trust, serving, connections) = (handler.trust.clone(), handler.serving.clone(), handler.connections.clone());

    let sockets = Sockets::create(&config.socket_dir).map_err(|error| format!("SOCKET_DIR: {error}"))?;
    let (front_proxy, direct) = (sockets.0.join("front-proxy"), sockets.0.join("direct"));
    let classes = [(Class::FrontProxy, front_proxy.as_path()), (Class::Direct, direct.as_path())];
    server::start(&handler, &classes, config.max_concurrent)?;
    let (follower, noter) = (trust.clone(), changes.clone());
    let read = move || {
        let found = kube.request_header();
        noter.note("request header configuration", &found);
        found.ok()
    };
    thread::spawn(move || follower.follow(read));
    if let Err(error) = sysdig.check_configured() {
        log::warn!("reads are refused until this is mended: {}", error.message);
    }
    // Discovery's list; nothing else depends on it.
    every([600, 30], move || {
        let found = sysdig.catalogue().map(|metrics| handler.list(&metrics));
        if found.as_ref().err().is_none_or(|error| error.reason != Reason::NotConfigured) {
            changes.note("metric catalogue", &found);
        }
        found.is_ok()
    });

    let listener = listen(config.listen).map_err(|error| format!("LISTEN_ADDR: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let tls = server_config(serving, config.tls13_only).map_err(|error| error.to_string())?;
    let door = Arc::new(Door { connections: connections.clone(), tls, trust, front_proxy, direct, age: AGE });
    log::info!("sysdig-metrics-adapter {} listening on {address}", env!("CARGO_PKG_VERSION"));
    thread::spawn(move || door.serve(&listener));

    while !ending.load(Ordering::Relaxed) {
        thread::park_timeout(Duration::from_millis(50));
    }
    log::info!("ending: not ready any more, answering for {} s", GRACE.as_secs());
    connections.draining.store(true, Ordering::Relaxed);
    thread::sleep(GRACE);
    if !connections.close_idle(PATIENCE) {
        log::warn!("some requests are still being answered after {} s", PATIENCE.as_secs());
    }
    Ok(())
}

/// Does `work` now and then for ever: again after so many seconds when it went well, or when it did not.
fn every([period, retry]: [u64; 2], mut work: impl FnMut() -> bool + Send + 'static) {
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(if work() { period } else { retry }));
        }
    });
}

/// The serving certificate: from files, which are followed, or kept by [`Keeper`].
fn serve_certificate(config: &Config, kube: &Arc<Kube>, changes: &Arc<Changes>) -> Result<Arc<Serving>, String> {
    let serving = Arc::new(Serving::default());
    let (follower, changes) = (serving.clone(), changes.clone());
    let Some((chain, key)) = config.tls_files.clone() else {
        let (kube, namespace) = (kube.clone(), kube.own_namespace());
        let keeper = Keeper { kube, serving: follower, changes, service: config.service_name.clone(), namespace };
        keeper.start()?;
        every([60, 5], move || keeper.keep());
        return Ok(serving);
    };
    let mut known = Vec::new();
    let mut load = move || {
        let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        let pair = read(&chain).and_then(|chain| certified_key(chain, read(&key)?));
        let pair = pair.map_err(|mistake| refusal!(NotConfigured, "{} is not used: {mistake}", chain.display()));
        changes.note("serving certificate", &pair);
        if let Some(pair) = pair.ok().filter(|pair| pair.cert != known) {
            known.clone_from(&pair.cert);
            follower.replace(pair);
            follower.settle();
            log::info!("serving certificate {} is in use", chain.display());
        }
        true
    };
    load();
    every([10, 10], load);
    Ok(serving)
}

fn listen(address: Option<SocketAddr>) -> io::Result<TcpListener> {
    match address {
        Some(address) => TcpListener::bind(address),
        None => TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).or_else(|error| match error.kind() {
            ErrorKind::AddrInUse | ErrorKind::PermissionDenied => Err(error),
            _ => TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)),
        }),
    }
}

/// How many connections fit below the limit of open files, as /proc/self/limits tells it.
fn capacity(limits: &str) -> usize {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft: usize = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(usize::MAX);
    (soft.saturating_sub(SPARE_DESCRIPTORS) / DESCRIPTORS).clamp(8, MOST_CONNECTIONS)
}

/// The directory of the inner sockets, which only this process may enter; removed at the end.
struct Sockets(PathBuf);

impl Sockets {
    fn create(parent: &Path) -> io::Result<Self> {
        let unique = RandomState::new().hash_one(std::process::id());
        let directory = parent.join(format!("sysdig-metrics-adapter-{unique:016x}"));
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", directory.display())))?;
        Ok(Self(directory))
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_connections_stays_below_the_limit_of_open_files() {
        let limits =
            |soft| format!("Limit  Soft Limit  Hard Limit  Units\nMax open files            {soft}   524288  files\n");
        for (soft, expected) in [("1024", 240), ("1048576", 512), ("unlimited", 512), ("64", 8), ("", 512), ("256", 48)]
        {
            assert_eq!(capacity(&limits(soft)), expected, "{soft}");
        }
        assert_eq!(capacity(""), 512);
    }

    #[test]
    fn control_characters_cannot_start_a_line() {
        assert_eq!("a\nb\u{1b}é".chars().map(visible).collect::<String>(), "a\\nb\\u{1b}é");
    }

    #[test]
    fn sockets_lie_in_a_private_directory_that_goes_with_them() {
        use std::os::unix::fs::PermissionsExt;
        let parent = env::temp_dir();
        let (sockets, other) = (Sockets::create(&parent).unwrap(), Sockets::create(&parent).unwrap());
        let directory = sockets.0.clone();
        assert_ne!(directory, other.0, "what a crash left behind is not used again");
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(sockets.0.join("direct"), "").unwrap();
        drop(sockets);
        assert!(!directory.exists());
        assert!(Sockets::create(Path::new("/nonexistent")).is_err());
    }
}
