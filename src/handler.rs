//! One request, from who asks to the answer; what must wait is handed back as such.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::api::{Response, metric_value_list};
use crate::connections::Connections;
use crate::discovery::{self, Document, Form};
use crate::error::{Error, Reason};
use crate::openapi;
use crate::readings::Readings;
use crate::route::{ApiVersion, Probe, Read, Route, percent_decode, route};
use crate::tls::Serving;
use crate::trust::Trust;

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
    /// Where it came from.
    pub class: Class,
    /// `GET`
    pub method: String,
    /// Path and query.
    pub target: String,
    /// `Accept`
    pub accept: Option<String>,
    /// `If-None-Match`
    pub if_none_match: Option<String>,
    /// The user whom a front proxy names, percent-encoded.
    pub user: Option<String>,
}

/// What to do with a request.
#[derive(Debug)]
pub enum Answer {
    /// Send this.
    Now(Response),
    /// Ask [`Handler::read`] from where waiting is allowed.
    Slow(Box<Read>),
}

/// Answers requests.
#[derive(Debug)]
pub struct Handler {
    readings: Readings,
    trust: Arc<Trust>,
    serving: Arc<Serving>,
    connections: Arc<Connections>,
    resources: RwLock<[Document; 2]>,
}

impl Handler {
    /// Discovery lists well-known metrics until [`Self::list`] is called.
    pub fn new(readings: Readings, trust: Arc<Trust>, serving: Arc<Serving>, connections: Arc<Connections>) -> Self {
        Self { readings, trust, serving, connections, resources: RwLock::new(resource_lists(&[])) }
    }

    /// From now on discovery lists these metrics.
    pub fn list(&self, metrics: &[String]) {
        let lists = resource_lists(metrics);
        *self.resources.write().unwrap_or_else(PoisonError::into_inner) = lists;
    }

    /// Answers from memory, or says that the answer must be waited for.
    pub fn answer(&self, asked: &Asked) -> Answer {
        match self.decide(asked) {
            Ok(answer) => answer,
            Err(error) => Answer::Now(error.response()),
        }
    }

    /// Reads a metric; waits for Sysdig and the Kubernetes API.
    pub fn read(&self, read: &Read) -> Response {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match self.readings.read(read, now) {
            Ok(value) => metric_value_list(read, value),
            Err(error) => {
                log::debug!("{}: {}: {}", read.path, error.reason.word(), error.message);
                error.response()
            }
        }
    }

    fn decide(&self, asked: &Asked) -> Result<Answer, Error> {
        let routed = route(&asked.method, &asked.target);
        let open = matches!(routed, Ok(Route::Health(..) | Route::Version));
        if !open {
            authenticate(asked)?;
        }
        let accept = asked.accept.as_deref();
        let etag = asked.if_none_match.as_deref();
        let response = match routed? {
            Route::Health(probe, verbose) => self.health(probe, verbose),
            Route::Apis => match discovery::negotiate_apis(accept) {
                Form::Plain => document(discovery::group_list(), etag),
                Form::Aggregated(version) => document(discovery::group_discovery(version), etag),
                Form::NotAcceptable => return Err(not_acceptable()),
            },
            _ if !discovery::accepts_json(accept) => return Err(not_acceptable()),
            Route::Group => document(discovery::group(), etag),
            Route::OpenApiV2 => document(Document::json(openapi::V2), etag),
            Route::OpenApiV3(version) => document(Document::json(openapi::v3(version)), etag),
            Route::OpenApiV3Index => document(Document::json(&openapi::v3_index().to_string()), etag),
            Route::Read(read) => return Ok(Answer::Slow(read)),
            Route::Resources(version) => document(self.resource_list(version), etag),
            Route::Root => document(discovery::root(), etag),
            Route::Version => version(),
        };
        Ok(Answer::Now(response))
    }

    fn resource_list(&self, version: ApiVersion) -> Document {
        let [v1beta1, v1beta2] = &*self.resources.read().unwrap_or_else(PoisonError::into_inner);
        match version {
            ApiVersion::V1Beta1 => v1beta1.clone(),
            ApiVersion::V1Beta2 => v1beta2.clone(),
        }
    }

    /// Never depends on Sysdig: a pod that is not ready makes its APIService unavailable, and that
    /// breaks kubectl and the deletion of namespaces.
    fn health(&self, probe: Probe, verbose: bool) -> Response {
        let name = match probe {
            Probe::Health => "healthz",
            Probe::Live => "livez",
            Probe::Ready => "readyz",
        };
        let mut checks = vec![("ping", true)];
        if probe == Probe::Ready {
            checks.push(("certificate", self.serving.is_usable()));
            checks.push(("requestheader", self.trust.current().is_some()));
            checks.push(("shutdown", !self.connections.draining()));
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

/// Who asks must be proved; a client certificate of the cluster or a bearer token proves nothing here.
fn authenticate(asked: &Asked) -> Result<String, Error> {
    let claimed = asked.user.as_deref().filter(|_| asked.class == Class::FrontProxy);
    claimed.and_then(|user| percent_decode(user, false)).ok_or_else(|| {
        Error::new(
            Reason::Unauthenticated,
            "Unauthorized: requests come through the Kubernetes API server (kubectl get --raw /apis/custom.metrics.k8s.io)",
        )
    })
}

fn not_acceptable() -> Error {
    Error::new(Reason::NotAcceptable, "only application/json is served: the Accept header does not allow it")
}

/// A document, or 304 for who has it already. The aggregator asks for all of them every minute.
fn document(document: Document, if_none_match: Option<&str>) -> Response {
    let tag = discovery::etag(&document.body);
    let known = discovery::not_modified(if_none_match, &tag);
    let (status, body) = if known { (304, Vec::new()) } else { (200, document.body) };
    let mut response = Response::bytes(status, document.content_type, body);
    response.headers.extend([("ETag", tag), ("Vary", "Accept".to_owned())]);
    response
}

fn resource_lists(metrics: &[String]) -> [Document; 2] {
    [ApiVersion::V1Beta1, ApiVersion::V1Beta2].map(|version| discovery::resource_list(version.name(), metrics))
}

/// As every API server tells its version, with the fields that clients expect.
fn version() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    let mut parts = version.split('.');
    Response::json(
        200,
        &json!({
            "major": parts.next(),
            "minor": parts.next(),
            "gitVersion": format!("v{version}"),
            "gitCommit": "",
            "gitTreeState": "",
            "buildDate": "",
            "goVersion": "",
            "compiler": "",
            "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
        }),
    )
}
