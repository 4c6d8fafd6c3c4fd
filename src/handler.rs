//! One request, from who asks to the answer; what must wait says so.

use crate::auth::{Auth, User};
use crate::discovery::{self, etag, negotiate, not_modified};
use crate::prelude::*;
use crate::{api::metric_value_list, definitions::Definitions, route, route::percent_decode, store::Store};
use std::{env::consts, mem};
use tiny_http::Request;

/// A request; whether a front proxy brought it is a fact of the inner server it came over, never of a header.
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) front_proxy: bool,
    pub(crate) since: Instant,
    /// For the log: who asks, once that is known.
    pub(crate) user: String,
}

/// Why there is no answer: a refusal, or [`WAIT`].
pub(crate) type Stop = Option<Error>;
/// Ask again from where waiting for this is allowed.
pub(crate) const WAIT: Stop = None;

/// What an answer may wait for; each includes those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
        if let Ok(Route::Open(name, verbose)) = &routed {
            return Ok(if name == "version" { version() } else { self.health(name, *verbose) });
        }
        let (now, review) = (Instant::now(), wait >= Wait::Reviews);
        let user = self.user(asked, review, now)?;
        asked.user.clone_from(&user.name);
        let route = routed.or_else(|mistake| self.definitions.find("").and(Err(mistake)))?;
        let path = asked.request.url().split('?').next().unwrap_or_default();
        self.auth.check(user, &route, path, review, now)?;
        let form = negotiate(header(asked, "Accept"), path.trim_end_matches('/') == "/apis")?;
        let text = match route {
            Route::Read(read) => {
                let (items, window) = self.read(&read, wait == Wait::Sysdig, unix_now())?;
                return Ok(metric_value_list(&read, path, &items, window));
            }
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
