//! One request, from who asks to the answer; what must wait says so.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use serde_json::json;

use crate::api::{Response, metric_value_list};
use crate::auth::{Auth, User, unauthenticated};
use crate::config::Secret;
use crate::connections::Connections;
use crate::discovery::{self, Form, accepts_json, etag, negotiate_apis, not_modified};
use crate::error::{Error, refusal};
use crate::readings::Readings;
use crate::requestheader::Trust;
use crate::route::{Route, VERSIONS, route};
use crate::timestamp::unix_now;
use crate::tls::Serving;

/// By which inner server a request came: a fact of the connection, never of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    FrontProxy,
    Direct,
}

#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) class: Class,
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) accept: Option<String>,
    pub(crate) if_none_match: Option<String>,
    pub(crate) authorization: Option<Secret>,
    /// Whom the front proxy names; counts in its class only.
    pub(crate) user: User,
}

/// Why there is no answer: a refusal, or [`WAIT`].
pub(crate) type Stop = Option<Error>;
/// Ask again with `wait`, from where waiting is allowed.
pub(crate) const WAIT: Stop = None;

pub(crate) struct Handler {
    pub(crate) auth: Arc<Auth>,
    pub(crate) readings: Readings,
    pub(crate) trust: Arc<Trust>,
    pub(crate) serving: Arc<Serving>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) resources: RwLock<[String; 2]>,
}

impl Handler {
    pub(crate) fn list(&self, metrics: &[String]) {
        let lists = resource_lists(metrics);
        *self.resources.write().unwrap_or_else(PoisonError::into_inner) = lists;
    }

    /// The answer; None if it cannot be had from memory and `wait` is false.
    pub(crate) fn answer(&self, asked: &Asked, wait: bool) -> Option<Response> {
        self.decide(asked, wait).map(Some).unwrap_or_else(|stop| {
            let error = stop?;
            log::debug!("{} {}: {}: {}", asked.method, asked.target, error.reason.word(), error.message);
            Some(error.response())
        })
    }

    fn decide(&self, asked: &Asked, wait: bool) -> Result<Response, Stop> {
        let routed = route(&asked.method, &asked.target);
        match routed {
            Ok(Route::Health(name, verbose)) => return Ok(self.health(name, verbose)),
            Ok(Route::Version) => return Ok(version()),
            _ => {}
        }
        let now = Instant::now();
        let user = self.user(asked, wait, now)?;
        let route = routed?;
        let path = asked.target.split('?').next().unwrap_or_default();
        self.auth.check(&user, &route, path, wait, now)?;
        let (accept, known) = (asked.accept.as_deref(), asked.if_none_match.as_deref());
        let form = negotiate_apis(accept);
        let acceptable = if route == Route::Apis { form != Form::NotAcceptable } else { accepts_json(accept) };
        if !acceptable {
            return Err(refusal!(NotAcceptable, "only application/json is served, which Accept does not allow").into());
        }
        if let (Route::Apis, Form::Aggregated(version)) = (&route, form) {
            let content_type = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
            return Ok(document(&content_type, &discovery::api_group_discovery_list(version), known));
        }
        let json = |text: &str| Ok(document("application/json", text, known));
        match route {
            Route::Read(read) if wait => Ok(metric_value_list(&read, &self.readings.read(&read, unix_now())?)),
            Route::Read(_) => Err(WAIT),
            Route::Document(document) => json(&document),
            Route::Resources(version) => {
                let lists = self.resources.read().unwrap_or_else(PoisonError::into_inner);
                json(VERSIONS.iter().zip(&*lists).find(|(it, _)| **it == version).map_or("{}", |(_, list)| list))
            }
            Route::Apis | Route::Health(..) | Route::Version => json(&discovery::api_group_list()),
        }
    }

    /// A front proxy's word counts on its own connections only; all others need a bearer token.
    fn user(&self, asked: &Asked, wait: bool, now: Instant) -> Result<User, Stop> {
        if asked.class == Class::FrontProxy && !asked.user.name.is_empty() {
            return Ok(asked.user.clone().authenticated());
        }
        let header = asked.authorization.as_ref().map(Secret::expose);
        let words = header.and_then(|value| value.split_once(' '));
        let (_, token) = words.filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer")).ok_or_else(unauthenticated)?;
        self.auth.user(token.trim(), wait, now)
    }

    /// Never depends on Sysdig: without a ready pod the APIService breaks kubectl and the deletion of namespaces.
    fn health(&self, name: &str, verbose: bool) -> Response {
        let mut checks = vec![("ping", true)];
        if name == "readyz" {
            checks.push(("certificate", self.serving.is_settled()));
            checks.push(("requestheader", self.trust.current().is_some()));
            checks.push(("shutdown", !self.connections.draining.load(Ordering::Relaxed)));
        }
        let passed = checks.iter().all(|(_, passed)| *passed);
        if passed && !verbose {
            return Response::text(200, "ok");
        }
        let line =
            |(check, ok): &(&str, bool)| if *ok { format!("[+]{check} ok\n") } else { format!("[-]{check} failed\n") };
        let lines: String = checks.iter().map(line).collect();
        let (status, verdict) = if passed { (200, "passed") } else { (503, "failed") };
        Response::text(status, &format!("{lines}{name} check {verdict}\n"))
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

pub(crate) fn resource_lists(metrics: &[String]) -> [String; 2] {
    VERSIONS.map(|version| discovery::api_resource_list(version, metrics))
}

/// As every API server tells its version, with the fields that clients expect.
fn version() -> Response {
    let platform = format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH);
    let (major, minor) = (env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"));
    let version = json!({
        "major": major, "minor": minor, "gitVersion": concat!("v", env!("CARGO_PKG_VERSION")), "platform": platform,
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
    });
    Response::json(200, &version)
}
