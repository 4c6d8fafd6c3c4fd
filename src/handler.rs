//! One request, from who asks to the answer; what must wait says so.

use crate::auth::{Auth, User, unauthenticated};
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

impl Asked {
    fn values(&self, name: &'static str) -> impl Iterator<Item = &str> {
        self.request.headers().iter().filter(move |it| it.field.equiv(name)).map(|it| it.value.as_str())
    }
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
        match &routed {
            Ok(Route::Health(name, verbose)) => return Ok(self.health(name, *verbose)),
            Ok(Route::Version) => return Ok(version()),
            _ => {}
        }
        let (now, review) = (Instant::now(), wait >= Wait::Reviews);
        let user = self.user(asked, review, now)?;
        asked.user.clone_from(&user.name);
        let route = routed.or_else(|mistake| self.definitions.find("").and(Err(mistake)))?;
        let path = asked.request.url().split('?').next().unwrap_or_default();
        self.auth.check(&user, &route, path, review, now)?;
        let (accept, known) = (asked.values("Accept").next(), asked.values("If-None-Match").next());
        let form = negotiate(accept, path.trim_end_matches('/') == "/apis")?;
        let (kind, text) = match (route, form) {
            (Route::Read(read), _) => {
                let (items, window) = self.read(&read, wait == Wait::Sysdig, unix_now())?;
                return Ok(metric_value_list(&read, &items, window));
            }
            (_, Some(version)) => {
                let kind = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
                (kind, discovery::document(version, self.config.external).unwrap_or_default())
            }
            (Route::Document(document), _) => (JSON.to_owned(), document),
            (Route::Resources(api), _) => (JSON.to_owned(), lock(&self.resources.1).get(&api).cloned().unwrap_or_default()),
            (Route::Health(..) | Route::Version, _) => return Ok(version()),
        };
        Ok(document(&kind, &text, known))
    }

    /// A front proxy's word counts on its own connections only; all others need a bearer token.
    fn user(&self, asked: &Asked, wait: bool, now: Instant) -> Result<User, Stop> {
        let named = asked.values("X-Remote").next().filter(|_| asked.front_proxy);
        let named: Option<User> = named.and_then(|text| serde_json::from_str(&percent_decode(text, false)?).ok());
        if let Some(user) = named.filter(|user| !user.name.is_empty()) {
            return Ok(user.authenticated());
        }
        let words = asked.values("Authorization").next().and_then(|value| value.split_once(' '));
        let (_, token) = words.filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer")).ok_or_else(unauthenticated)?;
        self.auth.user(token.trim(), wait, now)
    }

    /// Never depends on Sysdig: without a ready pod the APIService breaks kubectl and the deletion of namespaces.
    fn health(&self, name: &str, verbose: bool) -> Response {
        let mut checks = vec![("ping", true)];
        if name == "readyz" {
            checks.push(("certificate", self.serving.settled.load(Relaxed)));
            checks.push(("requestheader", lock(&self.trust.current).is_some()));
            checks.push(("shutdown", !self.connections.draining.load(Relaxed)));
        }
        let passed = checks.iter().all(|(_, passed)| *passed);
        let line = |(check, ok)| if ok { format!("[+]{check} ok\n") } else { format!("[-]{check} failed\n") };
        let lines: String = checks.into_iter().map(line).collect();
        let (status, verdict) = if passed { (200, "passed") } else { (503, "failed") };
        let text = if passed && !verbose { "ok".to_owned() } else { format!("{lines}{name} check {verdict}\n") };
        Response::bytes(status, "text/plain; charset=utf-8", text.into_bytes())
    }
}

/// A document, or 304 for who has it already. The aggregator asks for all of them every minute.
fn document(content_type: &str, text: &str, if_none_match: Option<&str>) -> Response {
    let tag = etag(text.as_bytes());
    let (status, body) = if not_modified(if_none_match, &tag) { (304, "") } else { (200, text) };
    let mut response = Response::bytes(status, content_type, body.as_bytes().to_vec());
    response.headers.extend([("ETag", tag), ("Vary", "Accept".to_owned())]);
    response
}

/// As every API server tells its version, with the fields that clients expect.
fn version() -> Response {
    let (major, minor) = (env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"));
    let (version, platform) = (concat!("v", env!("CARGO_PKG_VERSION")), format!("{}/{}", consts::OS, consts::ARCH));
    let version = json!({
        "major": major, "minor": minor, "gitVersion": version, "platform": platform, "gitCommit": "",
        "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
    });
    Response::json(200, &version)
}
