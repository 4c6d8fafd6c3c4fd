//! The life of the process: settings, start, work, drain, end.

use crate::prelude::*;
use crate::tls::{certified_key, server_config};
use crate::{auth::Auth, certs::Keeper, definitions::Definitions, door::Door, handler::Handler, server, store::Store};
use signal_hook::{consts, flag};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::{env, error, fs, process::ExitCode};
use std::{hash::BuildHasher, hash::RandomState, io::Write, os::unix::fs::DirBuilderExt, path::Path, path::PathBuf};

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

type Failure = Box<dyn error::Error>;

/// Runs the adapter until it is told to end. 2 means that a setting is wrong, 1 that the start failed.
pub fn run() -> ExitCode {
    start_log();
    let variable = |name: &str| Some(env::var_os(name)?.into_string().map_err(|_| "is not UTF-8".to_owned()));
    let done = Config::read(variable).map(forever).map_err(|mistakes| (2, mistakes)).and_then(|config| {
        let sysdig = Sysdig::new(config).map_err(|mistake| (2, vec![mistake]))?;
        let done = with_sockets(&config.socket_dir, |sockets| work(config, sysdig, sockets));
        done.map_err(|failure| (1, vec![failure.to_string()]))
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
        writeln!(out, "{} {} {text}", rfc3339(unix_now()), record.level())
    });
    log.init();
}

fn visible(c: char) -> String {
    if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
}

/// Does `work` with a fresh directory for the inner sockets, which only this process may enter.
fn with_sockets(parent: &Path, work: impl FnOnce(&Path) -> Result<(), Failure>) -> Result<(), Failure> {
    let unique = RandomState::new().hash_one(std::process::id());
    let own = parent.join(format!("sysdig-metrics-adapter-{unique:016x}"));
    fs::DirBuilder::new().mode(0o700).create(&own).map_err(|error| format!("SOCKET_DIR: {}: {error}", own.display()))?;
    let done = work(&own);
    let _ = fs::remove_dir_all(&own);
    done
}

fn work(config: &'static Config, sysdig: Sysdig, sockets: &Path) -> Result<(), Failure> {
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGTERM, consts::SIGINT] {
        // A second signal ends at once.
        flag::register_conditional_shutdown(signal, 1, ending.clone())?;
        flag::register(signal, ending.clone())?;
    }
    let (kube, sysdig) = (forever(Kube::new(config)), forever(sysdig));
    let (auth, serving, store) = (Auth::start(kube), serve_certificate(config, kube)?, Mutex::new(Store::new(config)));
    let places = capacity(&fs::read_to_string("/proc/self/limits").unwrap_or_default());
    let connections = Connections { places, ..Connections::default() };
    let trust = Trust { kube, current: Mutex::default(), asked: Mutex::default() };
    let (resources, definitions, news) = (Default::default(), Definitions::default(), Condvar::new());
    let handler =
        forever(Handler { auth, kube, sysdig, definitions, store, news, trust, serving, connections, config, resources });
    let Handler { trust, connections, .. } = handler;
    handler.list(None);

    let (front_proxy, direct) = (sockets.join("front-proxy"), sockets.join("direct"));
    server::start(handler, [(true, &front_proxy), (false, &direct)])?;
    server::crew("refresh", config.max_concurrent, || iter::repeat_with(|| handler.refresh()).for_each(drop))?;
    if config.insecure_skip_verify {
        log::warn!("SDC_INSECURE_SKIP_VERIFY: whoever sits between the adapter and Sysdig gets the API token");
    }
    if let Some(file) = config.definitions.clone() {
        let name = file.display().to_string();
        follow([file], move |[content]| {
            match handler.definitions.load(content) {
                Ok(hash) => log::info!("CONFIG_FILE {name} is in force, hash {hash}"),
                Err(mistake) => log::warn!("CONFIG_FILE {name} is not used: {mistake}"),
            }
            handler.list(None);
        });
    }
    every([30, 1], || trust.refreshed(true).is_some());
    if let Err(error) = sysdig.check_configured() {
        log::warn!("reads are refused until this is mended: {}", error.message);
    }
    // Discovery's list; nothing else depends on it.
    every([600, 30], move || {
        let found = sysdig.catalogue().map(|metrics| handler.list(Some(metrics)));
        let configured = found.as_ref().err().is_none_or(|error| error.reason != Reason::NotConfigured);
        configured && changes::noted("metric catalogue", found).is_ok()
    });

    // The second is for nodes without IPv6.
    let everywhere = [(Ipv6Addr::UNSPECIFIED, PORT).into(), (Ipv4Addr::UNSPECIFIED, PORT).into()];
    let addresses = config.listen.as_ref().map_or(&everywhere[..], std::slice::from_ref);
    let listener = TcpListener::bind(addresses).map_err(|error| format!("LISTEN_ADDR: {error}"))?;
    log::info!("sysdig-metrics-adapter {} listening on {}", env!("CARGO_PKG_VERSION"), listener.local_addr()?);
    let tls = server_config(handler.serving.clone(), config.tls13_only)?;
    let door = forever(Door { connections, tls, trust, front_proxy, direct, age: AGE });
    thread::spawn(move || door.serve(&listener));

    while !ending.load(Relaxed) {
        thread::park_timeout(Duration::from_millis(50));
    }
    log::info!("ending: not ready any more, answering for {} s", GRACE.as_secs());
    connections.draining.store(true, Relaxed);
    thread::sleep(GRACE);
    if !connections.close_idle(PATIENCE) {
        log::warn!("some requests are still being answered after {} s", PATIENCE.as_secs());
    }
    Ok(())
}

/// Does `work` now and then for ever: again after so many seconds when it went well, or when it did not.
fn every([period, retry]: [u64; 2], work: impl FnMut() -> bool + Send + 'static) {
    let rest = move |well| thread::sleep(Duration::from_secs(if well { period } else { retry }));
    thread::spawn(move || iter::repeat_with(work).for_each(rest));
}

/// Hands over what the files hold, now and whenever it changes; kubelet brings a change within a minute or two.
fn follow<const N: usize>(files: [PathBuf; N], apply: impl Fn([Result<Vec<u8>, String>; N]) + Send + 'static) {
    let mut known = None;
    let mut look = move || {
        let found = Some(files.each_ref().map(|file| fs::read(file).map_err(|error| error.to_string())));
        if known != found {
            known.clone_from(&found);
            found.map(&apply);
        }
        true
    };
    look();
    every([10, 10], look);
}

/// The serving certificate: from files, which are followed, or kept by [`Keeper`].
fn serve_certificate(config: &'static Config, kube: &'static Kube) -> Result<Arc<Serving>, String> {
    let serving = Arc::new(Serving::default());
    let served = serving.clone();
    if let Some((chain, key)) = config.tls_files.clone() {
        let name = chain.display().to_string();
        follow([chain, key], move |[chain, key]| {
            let key = key.map_err(|mistake| format!("TLS_KEY_FILE: {mistake}"));
            let pair = chain.and_then(|chain| certified_key(chain, key?));
            let pair = pair.map_err(|mistake| refusal!(NotConfigured, "{name} is not used: {mistake}"));
            if let Ok(pair) = changes::noted("serving certificate", pair) {
                *lock(&served.key) = Some(pair);
                served.settled.store(true, Relaxed);
                log::info!("serving certificate {name} is in use");
            }
        });
    } else {
        let keeper = Keeper { kube, serving: served, config, namespace: kube.own_namespace() };
        keeper.start()?;
        every([60, 5], move || keeper.keep());
    }
    Ok(serving)
}

/// How many connections fit below the limit of open files, as /proc/self/limits tells it.
fn capacity(limits: &str) -> usize {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft: usize = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(usize::MAX);
    (soft.saturating_sub(SPARE_DESCRIPTORS) / DESCRIPTORS).clamp(8, MOST_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_connections_stays_below_the_limit_of_open_files() {
        let limits = |soft| format!("Limit  Soft Limit  Hard Limit  Units\nMax open files            {soft}   524288  files\n");
        for (soft, expected) in [("1024", 240), ("1048576", 512), ("unlimited", 512), ("64", 8), ("", 512), ("256", 48)] {
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
        let mut used = Vec::new();
        for failure in [None, Some("as if the start had failed")] {
            let done = with_sockets(&env::temp_dir(), |directory| {
                assert_eq!(fs::metadata(directory)?.permissions().mode() & 0o777, 0o700);
                fs::write(directory.join("direct"), "")?;
                used.push(directory.to_owned());
                failure.map_or(Ok(()), |failure| Err(failure.into()))
            });
            assert_eq!(done.err().map(|failure| failure.to_string()).as_deref(), failure);
        }
        assert_ne!(used[0], used[1], "what a crash left behind is not used again");
        assert!(!used.iter().any(|directory| directory.exists()));
        let missing = with_sockets(Path::new("/nonexistent"), |_| Ok(())).unwrap_err();
        assert!(missing.to_string().starts_with("SOCKET_DIR: /nonexistent/"), "{missing}");
    }
}
