//! One request, from who asks to the answer; what must wait says so.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

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
pub enum Class {
    /// Over a connection whose client certificate speaks for users.
    FrontProxy,
    /// Over any other.
    Direct,
}

/// What of a request matters.
#[derive(Clone, Debug)]
pub struct Asked {
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
pub type Stop = Option<Error>;
/// Ask again with `wait`, from where waiting is allowed.
pub const WAIT: Stop = None;

/// Answers requests.
pub struct Handler {
    pub(crate) auth: Arc<Auth>,
    pub(crate) readings: Readings,
    pub(crate) trust: Arc<Trust>,
    pub(crate) serving: Arc<Serving>,
    pub(crate) connections: Arc<Connections>,
    /// The resource lists of both versions; see [`resource_lists`].
    pub(crate) resources: RwLock<[String; 2]>,
}

impl Handler {
    /// From now on discovery lists these metrics.
    pub fn list(&self, metrics: &[String]) {
        let lists = resource_lists(metrics);
        *self.resources.write().unwrap_or_else(PoisonError::into_inner) = lists;
    }

    /// The answer; None if it cannot be had from memory and `wait` is false.
    pub fn answer(&self, asked: &Asked, wait: bool) -> Option<Response> {
        self.decide(asked, wait).map(Some).unwrap_or_else(|stop| {
            let error = stop?;
            log::debug!("{} {}: {}: {}", asked.method, asked.target, error.reason.word(), error.message);
            Some(error.response())
        })
    }

    fn decide(&self, asked: &Asked, wait: bool) -> Result<Response, Stop> {
        let routed = route(&asked.method, &asked.target);
        if let Ok(Route::Health(name, verbose)) = routed {
            return Ok(self.health(name, verbose));
        }
        if let Ok(Route::Version) = routed {
            return Ok(version());
        }
        let now = Instant::now();
        let user = self.user(asked, wait, now)?;
        let route = routed?;
        let path = asked.target.split('?').next().unwrap_or_default();
        self.auth.check(&user, &route, path, wait, now)?;
        let (accept, known) = (asked.accept.as_deref(), asked.if_none_match.as_deref());
        if route == Route::Apis {
            return match negotiate_apis(accept) {
                Form::Plain => Ok(document("application/json", discovery::API_GROUP_LIST, known)),
                Form::Aggregated(version) => {
                    let content_type =
                        format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
                    Ok(document(&content_type, &discovery::api_group_discovery_list(version), known))
                }
                Form::NotAcceptable => Err(not_acceptable().into()),
            };
        }
        if !accepts_json(accept) {
            return Err(not_acceptable().into());
        }
        let json = |text: &str| Ok(document("application/json", text, known));
        match route {
            Route::Read(read) if wait => Ok(metric_value_list(&read, self.readings.read(&read, unix_now())?)),
            Route::Read(_) => Err(WAIT),
            Route::Group => json(discovery::API_GROUP),
            Route::OpenApiV2 => json(discovery::OPENAPI_V2),
            Route::OpenApiV3(version) => json(discovery::openapi_v3(version)),
            Route::OpenApiV3Index => json(&discovery::openapi_v3_index().to_string()),
            Route::Resources(version) => {
                let lists = self.resources.read().unwrap_or_else(PoisonError::into_inner);
                json(VERSIONS.iter().zip(&*lists).find(|(v, _)| **v == version).map_or("{}", |(_, list)| list))
            }
            Route::Apis | Route::Health(..) | Route::Root | Route::Version => json(discovery::ROOT),
        }
    }

    /// A front proxy's word counts on its own connections only; all others need a bearer token.
    fn user(&self, asked: &Asked, wait: bool, now: Instant) -> Result<User, Stop> {
        if asked.class == Class::FrontProxy && !asked.user.name.is_empty() {
            return Ok(asked.user.clone().authenticated());
        }
        let header = asked.authorization.as_ref().map(Secret::expose);
        let token =
            header.and_then(|value| value.split_once(' ')).filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or_else(unauthenticated)?;
        self.auth.user(token.trim(), wait, now)
    }

    /// Never depends on Sysdig: a pod that is not ready makes its APIService unavailable, and that
    /// breaks kubectl and the deletion of namespaces.
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
        let mut lines: String = checks
            .iter()
            .map(|(check, passed)| if *passed { format!("[+]{check} ok\n") } else { format!("[-]{check} failed\n") })
            .collect();
        lines.push_str(&format!("{name} check {}\n", if passed { "passed" } else { "failed" }));
        Response::text(if passed { 200 } else { 503 }, &lines)
    }
}

fn not_acceptable() -> Error {
    refusal!(NotAcceptable, "only application/json is served: the Accept header does not allow it")
}

/// A document, or 304 for who has it already. The aggregator asks for all of them every minute.
fn document(content_type: &str, text: &str, if_none_match: Option<&str>) -> Response {
    let tag = etag(text.as_bytes());
    let (status, body) = if not_modified(if_none_match, &tag) { (304, "") } else { (200, text) };
    let mut response = Response::bytes(status, content_type, body.as_bytes().to_vec());
    response.headers.extend([("ETag", tag), ("Vary", "Accept".to_owned())]);
    response
}

/// What discovery lists for these metrics; well-known ones for none.
pub fn resource_lists(metrics: &[String]) -> [String; 2] {
    VERSIONS.map(|version| discovery::api_resource_list(version, metrics))
}

/// As every API server tells its version, with the fields that clients expect.
fn version() -> Response {
    let mut version =
        ["gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler"].map(|key| (key, String::new())).to_vec();
    version.push(("major", env!("CARGO_PKG_VERSION_MAJOR").to_owned()));
    version.push(("minor", env!("CARGO_PKG_VERSION_MINOR").to_owned()));
    version.push(("gitVersion", concat!("v", env!("CARGO_PKG_VERSION")).to_owned()));
    version.push(("platform", format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH)));
    Response::json(200, &version.into_iter().collect::<BTreeMap<_, _>>())
}
