//! The inner servers, and one request from who asks to the answer. tiny_http's workers answer from memory; what must wait
//! says so, and goes to a bounded pool: a worker never waits for an upstream, so that health and discovery are answered
//! at once whatever Sysdig does.

use crate::auth::{Auth, User};
use crate::discovery::{self, etag, negotiate, not_modified};
use crate::prelude::*;
use crate::{api::metric_value_list, definitions::Definitions, readings::DEADLINE, route, route::percent_decode, store::Store};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::{env::consts, io, mem, panic::AssertUnwindSafe, panic::catch_unwind, path::Path, process};
use tiny_http::{Request, Server};

const WORKERS: usize = 2;
/// What must wait for the Kubernetes API's reviews, and then for Sysdig: neither holds up the other. With their labels.
const SLOW: [(Wait, &str, usize); 2] = [(Wait::Sysdig, "pool=\"sysdig\"", 32), (Wait::Reviews, "pool=\"reviews\"", 8)];
const QUEUE: usize = 256;
/// What waits for longer than this has a caller who gave up.
const PATIENCE: Duration = Duration::from_secs(10);
const STACK: usize = 512 * 1024;

/// A request; whether a front proxy brought it is a fact of the inner server it came over, never of a header.
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) front_proxy: bool,
    pub(crate) since: Instant,
    /// For log and metrics: who asks, once that is known, and for what kind of thing.
    pub(crate) user: String,
    pub(crate) route: &'static str,
}

/// Why there is no answer: a refusal, or [`WAIT`].
pub(crate) type Stop = Option<Error>;
/// Ask again from where waiting for this is allowed.
pub(crate) const WAIT: Stop = None;

/// What an answer may wait for; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wait {
    Nothing,
    Reviews,
    Sysdig,
}

/// What lives as long as the process.
pub(crate) struct Handler {
    pub(crate) auth: &'static Auth,
    pub(crate) kube: &'static Kube,
    pub(crate) sysdig: &'static Sysdig,
    pub(crate) definitions: Definitions,
    pub(crate) store: Mutex<Store>,
    /// There is something to ask Sysdig for, or something was answered.
    pub(crate) news: Condvar,
    pub(crate) trust: &'static Trust,
    pub(crate) serving: Arc<Serving>,
    pub(crate) connections: &'static Connections,
    pub(crate) config: &'static Config,
    /// The names of Sysdig's metrics, and the lists of [`APIS`], which are not locked while they are made.
    pub(crate) resources: (Mutex<Vec<String>>, Mutex<BTreeMap<route::Api, String>>),
}

fn header<'a>(asked: &'a Asked, name: &'static str) -> Option<&'a str> {
    asked.request.headers().iter().find(|it| it.field.equiv(name)).map(|it| it.value.as_str())
}

impl Handler {
    /// All of it, with room for so many connections; nothing is asked for yet.
    pub(crate) fn new(config: &'static Config, sysdig: Sysdig, places: usize) -> &'static Self {
        let (kube, sysdig, store) = (forever(Kube::new(config)), forever(sysdig), Mutex::new(Store::new(config)));
        let (auth, trust) = (Auth::start(kube), forever(Trust { kube, current: Mutex::default(), asked: Mutex::default() }));
        let connections = forever(Connections { places, ..Connections::default() });
        let (resources, definitions, news, serving) = Default::default();
        forever(Self { auth, kube, sysdig, definitions, store, news, trust, serving, connections, config, resources })
    }

    /// Takes over the names of Sysdig's metrics, if there are new ones, and what is defined.
    pub(crate) fn list(&self, metrics: Option<Vec<String>>) {
        let mut names = lock(&self.resources.0);
        *names = metrics.unwrap_or_else(|| mem::take(&mut names));
        let lists = APIS.map(|api| (api, discovery::api_resource_list(api, &names, self.definitions.in_force())));
        *lock(&self.resources.1) = lists.into();
    }

    /// Errors: a refusal, or that the answer cannot be had without waiting for more than `wait`.
    pub(crate) fn answer(&self, asked: &mut Asked, wait: Wait) -> Result<Response, Stop> {
        let custom = &self.definitions.in_force().resources;
        let routed = route::route(asked.request.method().as_str(), asked.request.url(), self.config.external, custom);
        asked.route = match &routed {
            Ok(Route::Open(name, _)) if name == "version" => return Ok(version()),
            Ok(Route::Open(name, verbose)) => return Ok(self.health(name, *verbose)),
            Ok(Route::Read(_)) => "read",
            Ok(_) => "document",
            Err(_) => "none",
        };
        let (now, review) = (Instant::now(), wait >= Wait::Reviews);
        let user = self.user(asked, review, now)?;
        asked.user.clone_from(&user.name);
        let route = routed.or_else(|mistake| self.definitions.find("").and(Err(mistake)))?;
        let path = asked.request.url().split('?').next().unwrap_or_default();
        self.auth.check(user, &route, path, review, now)?;
        let form = negotiate(header(asked, "Accept").filter(|_| route != Route::Metrics), path.trim_end_matches('/') == "/apis")?;
        let text = match route {
            Route::Read(read) => {
                let (items, window) = self.read(&read, DEADLINE * u32::from(wait == Wait::Sysdig), unix_now())?;
                let oldest = items.iter().map(|it| unix_now().saturating_sub(it.2)).max().unwrap_or_default();
                metrics::add("served_age_seconds", format!(r#"group="{}""#, read.api.0), oldest as f64);
                return Ok(metric_value_list(&read, path, &items, window));
            }
            Route::Metrics => return Ok(metrics::page(self)),
            Route::Document(plain) => discovery::document(form, self.config.external).unwrap_or(plain),
            Route::Resources(api) => lock(&self.resources.1).get(&api).cloned().unwrap_or_default(),
            Route::Open(..) => return Ok(version()),
        };
        // The aggregator asks for all documents every minute, and has them already.
        let tag = etag(text.as_bytes());
        let known = not_modified(header(asked, "If-None-Match"), &tag);
        let (status, body) = if known { (304, String::new()) } else { (200, text) };
        Ok(response(status, form, body, &[("ETag", &tag), ("Vary", "Accept")]))
    }

    /// A front proxy's word counts on its own connections only; all others need a bearer token.
    fn user(&self, asked: &Asked, wait: bool, now: Instant) -> Result<User, Stop> {
        let named = header(asked, "X-Remote").filter(|_| asked.front_proxy);
        let named: Option<User> = named.and_then(|text| serde_json::from_str(&percent_decode(text)?).ok());
        let words = header(asked, "Authorization").and_then(|value| value.split_once(' '));
        let token = words.filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
        named.filter(|user| !user.name.is_empty()).map_or_else(|| self.auth.user(token, wait, now), Ok)
    }

    /// Never depends on Sysdig: without a ready pod the APIService breaks kubectl and the deletion of namespaces.
    fn health(&self, name: &str, verbose: bool) -> Response {
        let (settled, trusted) = (self.serving.settled.load(Relaxed), lock(&self.trust.current).is_some());
        let serving = !self.connections.draining.load(Relaxed);
        let checks = [("ping", true), ("certificate", settled), ("requestheader", trusted), ("shutdown", serving)];
        let checks = checks.into_iter().take(if name == "readyz" { checks.len() } else { 1 });
        let passed = checks.clone().all(|(_, passed)| passed);
        let line = |(check, ok)| if ok { format!("[+]{check} ok\n") } else { format!("[-]{check} failed\n") };
        let lines: String = checks.map(line).collect();
        let (status, verdict) = if passed { (200, "passed") } else { (503, "failed") };
        let text = if passed && !verbose { "ok".to_owned() } else { format!("{lines}{name} check {verdict}\n") };
        response(status, "text/plain; charset=utf-8", text, &[])
    }
}

/// As every API server tells its version, with the fields that clients expect.
fn version() -> Response {
    let version = json!({
        "major": env!("CARGO_PKG_VERSION_MAJOR"), "minor": env!("CARGO_PKG_VERSION_MINOR"),
        "gitVersion": concat!("v", env!("CARGO_PKG_VERSION")), "platform": format!("{}/{}", consts::OS, consts::ARCH),
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
    });
    response(200, JSON, version.to_string(), &[])
}

pub(crate) fn start(handler: &'static Handler, sockets: [(bool, &Path); 2]) -> io::Result<()> {
    let mut next: Option<(SyncSender<Asked>, &str)> = None;
    for (wait, pool, threads) in SLOW {
        let (queue, jobs) = sync_channel(QUEUE);
        let (jobs, next) = (forever(Mutex::new(jobs)), next.replace((queue, pool)));
        crew("slow", threads, move || {
            let jobs = iter::from_fn(|| lock(jobs).recv().ok()).inspect(|_| metrics::add("queued_requests", pool, -1.0));
            jobs.for_each(|asked| dispatch(handler, asked, wait, next.as_ref()));
        })?;
    }
    for (front_proxy, path) in sockets {
        let server = Server::http_unix(path).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        let (server, next) = (forever(server), next.clone());
        crew("worker", WORKERS, move || {
            while let Ok(request) = server.recv() {
                let asked = Asked { request, front_proxy, since: Instant::now(), user: String::new(), route: "open" };
                dispatch(handler, asked, Wait::Nothing, next.as_ref());
            }
            // tiny_http accepts no more after an error. Kubernetes starts the pod's container anew.
            log::error!("the inner server has ended");
            process::exit(1);
        })?;
    }
    Ok(())
}

/// As many threads for the same work.
pub(crate) fn crew(name: &str, threads: usize, work: impl FnOnce() + Clone + Send + 'static) -> io::Result<()> {
    (0..threads).try_for_each(|_| spawn(name, work.clone()))
}

pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let started = thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work);
    started.map(drop).map_err(|error| io::Error::other(format!("no thread could be started: {error}")))
}

/// Answers, or hands over to `next`, where it may wait for longer.
fn dispatch(handler: &Handler, mut asked: Asked, wait: Wait, next: Option<&(SyncSender<Asked>, &'static str)>) {
    let late = asked.since.elapsed() > PATIENCE;
    let answer = guarded(|| if late { Err(WAIT) } else { handler.answer(&mut asked, wait) });
    let handed = match next.filter(|_| matches!(answer, Err(WAIT)) && !late) {
        Some((queue, pool)) => {
            metrics::add("queued_requests", *pool, 1.0);
            queue.try_send(asked).inspect_err(|_| metrics::add("queued_requests", *pool, -1.0))
        }
        None => Err(TrySendError::Full(asked)),
    };
    let Err(TrySendError::Full(asked) | TrySendError::Disconnected(asked)) = handed else { return };
    let overloaded = || refusal!(Overloaded, "more metrics are being read than the adapter can wait for: ask again");
    let answer = answer.map_err(|stop| stop.unwrap_or_else(|| Error { retry_after: Some(1), ..overloaded() }));
    let (reason, outcome) = (metrics::outcome(&answer), answer.as_ref().map_or_else(Error::to_string, |_| "ok".to_owned()));
    let response = answer.unwrap_or_else(|error| error.response());
    let Asked { request, since, user, route, .. } = asked;
    let (method, target, status) = (request.method(), request.url(), response.status_code().0);
    let labels = format!(r#"route="{route}",code="{status}",reason="{reason}",waited_for="{wait:?}""#);
    metrics::add("request_duration_seconds", labels, since.elapsed().as_secs_f64());
    log::debug!("{method} {target} by {user:?} in {:?}: {status} {outcome}", since.elapsed());
    request.respond(response).unwrap_or_else(|error| log::debug!("an answer could not be sent: {error}"));
}

/// A bug costs one answer, not a thread of a bounded pool.
pub(crate) fn guarded<T, E: From<Error>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let bug = || refusal!(Internal, "the adapter has a bug; please report it with its log (kubectl logs)");
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(bug().into()))
}
