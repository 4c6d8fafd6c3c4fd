//! The life of the process: settings, start, work, drain, end.

use crate::prelude::*;
use crate::tls::{certified_key, server_config};
use crate::{certs::Keeper, door, door::Door, handler, handler::Handler, random};
use signal_hook::{consts, flag};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::{env, error, fs, io::Write, os::unix::fs::DirBuilderExt, path::Path, path::PathBuf, process::ExitCode};

pub(crate) const NAME: &str = concat!("sysdig-metrics-adapter ", env!("CARGO_PKG_VERSION"));
const PORT: u16 = 10250;
/// Kubernetes goes on sending requests to an ending pod until every node knows that it ends.
const GRACE: Duration = Duration::from_secs(5);
/// For answers under way; together with [`GRACE`] well within the 30 s that Kubernetes gives.
const PATIENCE: Duration = Duration::from_secs(15);
/// Of a request under way: the connection, the door's side of the inner connection, and two of tiny_http's.
const DESCRIPTORS: usize = 4;
const SPARE_DESCRIPTORS: usize = 64;
const MOST_CONNECTIONS: usize = 512;

type Failure = Box<dyn error::Error>;

/// Runs the adapter until it is told to end. 2 means that a setting is wrong, 1 that the start failed.
pub fn run() -> ExitCode {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    log.format(|out, record| writeln!(out, "{} {} {}", rfc3339(unix_now()), record.level(), visible(&record.args().to_string())));
    log.init();
    let done = Config::read(variable).map(forever).map_err(|mistakes| (2, mistakes)).and_then(|config| {
        let sysdig = Sysdig::new(config).map_err(|mistake| (2, vec![mistake]))?;
        let done = with_sockets(&config.socket_dir, |sockets| work(config, sysdig, sockets));
        done.map_err(|failure| (1, vec![failure.to_string()]))
    });
    let Err((code, mistakes)) = done else { return ExitCode::SUCCESS };
    mistakes.iter().for_each(|mistake| log::error!("{mistake}"));
    ExitCode::from(code)
}

/// An environment variable. Errors: It is not UTF-8.
pub(crate) fn variable(name: &str) -> Option<Result<String, String>> {
    Some(env::var_os(name)?.into_string().map_err(|_| "is not UTF-8".to_owned()))
}

/// Control characters are escaped, so that nothing from outside can start a line of its own.
pub(crate) fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Does `work` with a fresh directory for the inner sockets, which only this process may enter.
fn with_sockets(parent: &Path, work: impl FnOnce(&Path) -> Result<(), Failure>) -> Result<(), Failure> {
    let own = parent.join(format!("sysdig-metrics-adapter-{:016x}", random().to_bits()));
    fs::DirBuilder::new().mode(0o700).create(&own).map_err(|error| format!("SOCKET_DIR: {}: {error}", own.display()))?;
    let done = work(&own);
    let _ = fs::remove_dir_all(&own);
    done
}

fn work(config: &'static Config, sysdig: Sysdig, sockets: &Path) -> Result<(), Failure> {
    let places = capacity(&fs::read_to_string("/proc/self/limits").unwrap_or_default());
    let handler = Handler::new(config, sysdig, places);
    let Handler { sysdig, trust, connections, .. } = handler;
    for signal in [consts::SIGTERM, consts::SIGINT] {
        // A second signal ends at once.
        flag::register_conditional_shutdown(signal, 1, connections.draining.clone())?;
        flag::register(signal, connections.draining.clone())?;
    }
    serve_certificate(handler)?;
    handler.list(None);

    let (front_proxy, direct) = (sockets.join("front-proxy"), sockets.join("direct"));
    handler::start(handler, [(true, &front_proxy), (false, &direct)])?;
    handler::crew("refresh", config.max_concurrent, || iter::repeat_with(|| handler.refresh()).for_each(drop))?;
    if let Some(address) = config.metrics {
        let listener = TcpListener::bind(address).map_err(|error| format!("METRICS_ADDR: {address}: {error}"))?;
        log::info!("metrics on {}", listener.local_addr()?);
        // Few at a time, of which the newest comes before the oldest.
        let places = forever(Connections { places: 8, ..Connections::default() });
        thread::spawn(move || door::accept(&listener, places, |stream, _| door::scrape(stream, handler)));
    }
    if config.insecure_skip_verify {
        log::warn!("SDC_INSECURE_SKIP_VERIFY: whoever sits between the adapter and Sysdig gets the API token");
    }
    if let Some(file) = &config.definitions {
        follow([file], |[content]| {
            match handler.definitions.load(content) {
                Ok(hash) => log::info!("CONFIG_FILE {} is in force, hash {hash}", file.display()),
                Err(mistake) => log::warn!("CONFIG_FILE {} is not used: {mistake}", file.display()),
            }
            handler.list(None);
        });
    }
    every([30, 1], || trust.refreshed(true).is_some());
    sysdig.check_configured().unwrap_or_else(|error| log::warn!("reads are refused until this is mended: {}", error.message));
    // Discovery's list; nothing else depends on it.
    every([600, 30], move || {
        let found = sysdig.catalogue().map(|metrics| handler.list(Some(metrics)));
        let configured = found.as_ref().err().is_none_or(|error| error.reason != Reason::NotConfigured);
        configured && metrics::noted("metric catalogue", found).is_ok()
    });

    // The second is for nodes without IPv6.
    let everywhere = [(Ipv6Addr::UNSPECIFIED, PORT).into(), (Ipv4Addr::UNSPECIFIED, PORT).into()];
    let addresses = config.listen.as_ref().map_or(&everywhere[..], std::slice::from_ref);
    let listener = TcpListener::bind(addresses).map_err(|error| format!("LISTEN_ADDR: {error}"))?;
    log::info!("{NAME} listening on {}", listener.local_addr()?);
    let tls = server_config(handler.serving.clone(), config.tls13_only)?;
    let door = forever(Door { connections, tls, trust, front_proxy, direct, age: Duration::from_secs(600) });
    thread::spawn(move || door::accept(&listener, connections, |stream, ticket| door.connection(stream, ticket)));

    while !connections.draining.load(Relaxed) {
        thread::park_timeout(Duration::from_millis(50));
    }
    log::info!("ending: not ready any more, answering for {} s", GRACE.as_secs());
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
fn follow<const N: usize>(files: [&'static PathBuf; N], apply: impl Fn([Result<Vec<u8>, String>; N]) + Send + 'static) {
    let mut known = None;
    let mut look = move || {
        let found = files.map(|file| fs::read(file).map_err(|error| error.to_string()));
        if known.replace(found.clone()).as_ref() != Some(&found) {
            apply(found);
        }
        true
    };
    look();
    every([10, 10], look);
}

/// The serving certificate: from files, which are followed, or kept by [`Keeper`].
fn serve_certificate(Handler { config, kube, serving, .. }: &'static Handler) -> Result<(), String> {
    if let Some((file, key_file)) = &config.tls_files {
        follow([file, key_file], move |[chain, key]| {
            let key = key.map_err(|mistake| format!("TLS_KEY_FILE: {mistake}"));
            let pair = chain.and_then(|chain| certified_key(chain, key?));
            let pair = pair.map_err(|mistake| refusal!(NotConfigured, "{} is not used: {mistake}", file.display()));
            if let Ok(pair) = metrics::noted("serving certificate", pair) {
                *lock(&serving.key) = Some(pair);
                serving.settled.store(true, Relaxed);
                log::info!("serving certificate {} is in use", file.display());
            }
        });
    } else {
        let keeper = Keeper { kube, serving: serving.clone(), namespace: kube.own_namespace() };
        keeper.start()?;
        every([60, 5], move || keeper.keep());
    }
    Ok(())
}

/// How many connections fit below the limit of open files, as /proc/self/limits tells it.
fn capacity(limits: &str) -> usize {
    let soft = |line: &str| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok();
    let soft = limits.lines().find_map(soft).unwrap_or(usize::MAX);
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
        assert_eq!(visible("a\nb\u{1b}é"), "a\\nb\\u{1b}é");
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
