//! The life of the process: settings, start, work, drain, end.

use std::fs::{self, DirBuilder};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::auth::Auth;
use crate::certs::Keeper;
use crate::changes::Changes;
use crate::config::Config;
use crate::connections::Connections;
use crate::door::Door;
use crate::error::{Error, Reason};
use crate::handler::{Class, Handler, resource_lists};
use crate::kube::Kube;
use crate::readings::Readings;
use crate::requestheader::Trust;
use crate::server;
use crate::sysdig::Sysdig;
use crate::timestamp::{rfc3339, unix_now};
use crate::tls::{Serving, certified_key, server_config};

const PORT: u16 = 10250;
/// Kubernetes goes on sending requests to an ending pod until every node knows that it ends.
const GRACE: Duration = Duration::from_secs(5);
/// For answers under way; together with [`GRACE`] well within the 30 s that Kubernetes gives.
const PATIENCE: Duration = Duration::from_secs(15);
/// Of connections, so that replicas share the load.
const AGE: Duration = Duration::from_secs(600);
const CERTIFICATE_PERIOD: Duration = Duration::from_secs(10);
const CATALOGUE_PERIOD: Duration = Duration::from_secs(600);
const CATALOGUE_RETRY: Duration = Duration::from_secs(30);
/// Of a request under way: the connection, the door's side of the inner connection, and two of tiny_http's.
const DESCRIPTORS: usize = 4;
const SPARE_DESCRIPTORS: usize = 64;
const MOST_CONNECTIONS: usize = 512;

/// Runs the adapter until it is told to end. 2 means that a setting is wrong, 1 that the start failed.
pub fn run() -> ExitCode {
    start_log();
    let prepared = Config::read(variable).and_then(|config| {
        let sysdig = Sysdig::new(&config).map_err(|mistake| vec![mistake])?;
        Ok((config, sysdig))
    });
    let (mistakes, code) = match prepared.map(|(config, sysdig)| work(&config, sysdig)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(mistake)) => (vec![mistake], 1),
        Err(mistakes) => (mistakes, 2),
    };
    mistakes.iter().for_each(|mistake| log::error!("{mistake}"));
    ExitCode::from(code)
}

fn variable(name: &str) -> Option<Result<String, String>> {
    std::env::var_os(name).map(|value| value.into_string().map_err(|_| "is not UTF-8".to_owned()))
}

/// Control characters are escaped, so that nothing from outside can start a line of its own.
fn start_log() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format(move |out, record| {
            let text: String = record.args().to_string().chars().map(visible).collect();
            writeln!(out, "{} {} {text}", rfc3339(unix_now()), record.level())
        })
        .init();
}

fn visible(c: char) -> String {
    if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
}

fn work(config: &Config, sysdig: Sysdig) -> Result<(), String> {
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // A second signal ends at once.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&ending)).map_err(|error| error.to_string())?;
        flag::register(signal, Arc::clone(&ending)).map_err(|error| error.to_string())?;
    }
    let kube = Arc::new(Kube::new(config));
    let sysdig = Arc::new(sysdig);
    let changes = Arc::new(Changes::default());
    let trust = Arc::new(Trust::default());
    let serving = serve_certificate(config, &kube, &changes)?;
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let connections = Arc::new(Connections::new(capacity(&limits)));
    let handler = Arc::new(Handler {
        auth: Auth::start(Arc::clone(&kube)),
        readings: Readings::new(config, Arc::clone(&kube), Arc::clone(&sysdig), Arc::clone(&changes)),
        trust: Arc::clone(&trust),
        serving: Arc::clone(&serving),
        connections: Arc::clone(&connections),
        resources: RwLock::new(resource_lists(&[])),
    });

    let sockets = Sockets::create(&config.socket_dir).map_err(|error| format!("SOCKET_DIR: {error}"))?;
    let (front_proxy, direct) = (sockets.0.join("front-proxy"), sockets.0.join("direct"));
    let classes = [(Class::FrontProxy, front_proxy.as_path()), (Class::Direct, direct.as_path())];
    server::start(&handler, &classes, config.max_concurrent)?;
    let (follower, noter) = (Arc::clone(&trust), Arc::clone(&changes));
    thread::spawn(move || {
        follower.follow(|| {
            let found = kube.request_header();
            noter.note("request header configuration", &found);
            found.ok()
        });
    });
    if let Err(error) = sysdig.check_configured() {
        log::warn!("reads are refused until this is mended: {}", error.message);
    }
    follow_catalogue(handler, sysdig, changes);

    let listener = listen(config.listen).map_err(|error| format!("LISTEN_ADDR: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let tls = server_config(serving, config.tls13_only).map_err(|error| error.to_string())?;
    let door = Arc::new(Door { connections: Arc::clone(&connections), tls, trust, front_proxy, direct, age: AGE });
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

/// The serving certificate: from files, which are followed, or kept by [`Keeper`].
fn serve_certificate(config: &Config, kube: &Arc<Kube>, changes: &Arc<Changes>) -> Result<Arc<Serving>, String> {
    let serving = Arc::new(Serving::default());
    let Some((chain, key)) = config.tls_files.clone() else {
        let keeper = Keeper {
            kube: Arc::clone(kube),
            serving: Arc::clone(&serving),
            changes: Arc::clone(changes),
            service: config.service_name.clone(),
            namespace: kube.own_namespace(),
        };
        serving.replace(keeper.temporary()?);
        thread::spawn(move || keeper.keep());
        return Ok(serving);
    };
    let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let (follower, mut known) = (Arc::clone(&serving), None);
    let mut load = move || {
        let files = read(&chain).and_then(|chain| Ok((chain, read(&key)?)));
        if known.as_ref() == Some(&files) {
            return;
        }
        match files.clone().and_then(|(chain, key)| certified_key(&chain, &key)) {
            Ok(made) => {
                follower.replace(made);
                follower.settle();
                log::info!("serving certificate {} is in use", chain.display());
            }
            Err(mistake) => log::warn!("serving certificate {} is not used: {mistake}", chain.display()),
        }
        known = Some(files);
    };
    load();
    thread::spawn(move || {
        loop {
            thread::sleep(CERTIFICATE_PERIOD);
            load();
        }
    });
    Ok(serving)
}

/// Keeps discovery's list up to date; nothing else depends on it.
fn follow_catalogue(handler: Arc<Handler>, sysdig: Arc<Sysdig>, changes: Arc<Changes>) {
    thread::spawn(move || {
        loop {
            let found = sysdig.catalogue().map(|metrics| handler.list(&metrics));
            if !matches!(found, Err(Error { reason: Reason::NotConfigured, .. })) {
                changes.note("metric catalogue", &found);
            }
            thread::sleep(if found.is_ok() { CATALOGUE_PERIOD } else { CATALOGUE_RETRY });
        }
    });
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
        let made = DirBuilder::new().mode(0o700).create(&directory);
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
        let parent = std::env::temp_dir();
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
