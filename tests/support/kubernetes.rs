//! A stand-in of a kube-apiserver: objects, access reviews and token reviews over TLS with an own CA.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use super::dir::replace;
use super::http::{HttpServer, Reply, Request, lock};
use super::pki::{Ca, rustls_server_config};

mod path;
mod reviews;
mod selector;
mod store;

pub use path::{ApiPath, SERVICE_ACCOUNT};
pub use reviews::{Authorizer, HPA};
pub use store::Store;

use path::{reason, status};

/// The namespace that the adapter is told to run in.
pub const NAMESPACE: &str = "custom-metrics";

const ACCESS_REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
const OWN_REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
const TOKEN_REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

/// What is wrong with the API server, or with the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 200 with something that is no JSON.
    Garbage,
    Hang,
    HangInBody,
    Reset,
    Status(u16),
    Truncated,
}

/// The stand-in; ends when dropped.
pub struct Kubernetes {
    server: HttpServer,
    shared: Arc<Shared>,
    ca: Ca,
}

struct Shared {
    store: Mutex<Store>,
    state: Mutex<State>,
    authorizer: Mutex<Authorizer>,
}

#[derive(Default)]
struct State {
    /// Of the service account: the newest last, which is what lies in the files.
    tokens: Vec<String>,
    users: BTreeMap<String, Value>,
    /// By path prefix.
    faults: BTreeMap<String, Fault>,
    forbidden: Vec<String>,
    requests: Vec<String>,
}

impl Kubernetes {
    /// Serves an empty cluster.
    pub fn start() -> Self {
        let ca = Ca::new("kubernetes");
        let leaf = ca.issue_server(&["kubernetes.default.svc", "localhost", "127.0.0.1"]);
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            state: Mutex::new(State { tokens: vec!["service-account-token".to_owned()], ..State::default() }),
            authorizer: Mutex::new(reviews::default_authorizer()),
        });
        let server = HttpServer::start(Some(rustls_server_config(&leaf)), {
            let shared = Arc::clone(&shared);
            move |request| shared.answer(request)
        });
        Self { server, shared, ca }
    }

    pub fn port(&self) -> u16 {
        self.server.port()
    }

    pub fn ca(&self) -> &Ca {
        &self.ca
    }

    pub fn server(&self) -> &HttpServer {
        &self.server
    }

    /// Writes `token`, `ca.crt` and `namespace` as kubelet mounts them.
    pub fn write_service_account(&self, dir: &Path) {
        let token = lock(&self.shared.state).tokens.last().cloned().unwrap_or_default();
        replace(&dir.join("token"), token);
        replace(&dir.join("ca.crt"), self.ca.pem());
        replace(&dir.join("namespace"), NAMESPACE);
    }

    /// From now on this is the one service account token that is accepted.
    pub fn set_token(&self, token: &str) {
        lock(&self.shared.state).tokens = vec![token.to_owned()];
    }

    /// This service account token is accepted beside the others, as in a rotation.
    pub fn accept_too(&self, token: &str) {
        lock(&self.shared.state).tokens.push(token.to_owned());
    }

    /// All objects. Changes made here keep their resourceVersion, other than through [`Self::object`].
    pub fn objects(&self) -> MutexGuard<'_, Store> {
        lock(&self.shared.store)
    }

    /// Writes an object; name, namespace and type may be left to the path.
    pub fn object(&self, path: &str, object: Value) {
        self.objects().put(path, object);
    }

    pub fn remove(&self, path: &str) {
        self.objects().remove(path);
    }

    /// RBAC does not allow anything below that path any more.
    pub fn forbid(&self, path_prefix: &str) {
        lock(&self.shared.state).forbidden.push(path_prefix.to_owned());
    }

    /// Takes back every [`Self::forbid`].
    pub fn allow(&self) {
        lock(&self.shared.state).forbidden.clear();
    }

    /// Every request fails.
    pub fn fail(&self, fault: Fault) {
        self.fail_path("/", fault);
    }

    /// Every request to a path with that prefix fails; the longest prefix counts.
    pub fn fail_path(&self, prefix: &str, fault: Fault) {
        lock(&self.shared.state).faults.insert(prefix.to_owned(), fault);
    }

    /// Takes back every fault.
    pub fn heal(&self) {
        lock(&self.shared.state).faults.clear();
    }

    /// Decides every SubjectAccessReview from now on: from its spec to its status.
    pub fn authorize(&self, decide: impl Fn(&Value) -> Value + Send + Sync + 'static) {
        *lock(&self.shared.authorizer) = Box::new(decide);
    }

    /// Makes `token` the bearer token of a user.
    pub fn user(&self, token: &str, username: &str, groups: &[&str]) {
        let user = json!({ "username": username, "uid": format!("uid-of-{username}"), "groups": groups });
        lock(&self.shared.state).users.insert(token.to_owned(), user);
    }

    /// Makes `token` nobody's.
    pub fn remove_user(&self, token: &str) {
        lock(&self.shared.state).users.remove(token);
    }

    /// Every request so far, as `GET /path?query`.
    pub fn requests(&self) -> Vec<String> {
        lock(&self.shared.state).requests.clone()
    }

    /// How many requests so far had `word` in their path.
    pub fn counter_of(&self, word: &str) -> usize {
        let route = |request: &String| request.split('?').next().is_some_and(|route| route.contains(word));
        lock(&self.shared.state).requests.iter().filter(|request| route(request)).count()
    }

    /// Writes how the front proxy proves itself, as kube-apiserver does for its extension servers.
    pub fn requestheader(&self, ca_pem: &str, allowed_names: &[&str]) {
        let list = |values: &[&str]| json!(values).to_string();
        let data = json!({
            "client-ca-file": self.ca.pem(),
            "requestheader-allowed-names": list(allowed_names),
            "requestheader-client-ca-file": ca_pem,
            "requestheader-extra-headers-prefix": list(&["X-Remote-Extra-"]),
            "requestheader-group-headers": list(&["X-Remote-Group"]),
            "requestheader-uid-headers": list(&["X-Remote-Uid"]),
            "requestheader-username-headers": list(&["X-Remote-User"]),
        });
        self.object(REQUEST_HEADER, json!({ "data": data }));
    }

    /// Makes a namespace, and in it a Deployment with its Ready Pods, Service and EndpointSlice.
    pub fn deployment(&self, namespace: &str, name: &str, replicas: usize) {
        self.deployment_of(namespace, name, replicas, replicas);
    }

    /// As [`Self::deployment`], with only the first `ready` of the Pods Ready. Replaces what was there.
    pub fn deployment_of(&self, namespace: &str, name: &str, replicas: usize, ready: usize) {
        let core = format!("/api/v1/namespaces/{namespace}");
        let pods = format!("{core}/pods/{name}-");
        self.objects().retain(|path, pod| !(path.starts_with(&pods) && pod["metadata"]["labels"]["app"] == name));
        self.object(&core, json!({ "status": { "phase": "Active" } }));
        let labels = json!({ "app": name });
        let template = json!({ "metadata": { "labels": labels }, "spec": { "containers": [{ "name": name }] } });
        self.object(
            &format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}"),
            json!({
                "metadata": { "labels": labels },
                "spec": { "replicas": replicas, "selector": { "matchLabels": labels }, "template": template },
                "status": { "replicas": replicas, "readyReplicas": ready, "availableReplicas": ready },
            }),
        );
        let ports = json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]);
        self.object(
            &format!("{core}/services/{name}"),
            json!({ "metadata": { "labels": labels }, "spec": { "selector": labels, "ports": ports } }),
        );
        let mut endpoints = Vec::new();
        for index in 0..replicas {
            let (pod, is_ready) = (format!("{name}-{index}"), index < ready);
            let condition = json!({ "type": "Ready", "status": if is_ready { "True" } else { "False" } });
            self.object(
                &format!("{core}/pods/{pod}"),
                json!({
                    "metadata": { "labels": labels },
                    "spec": { "containers": [{ "name": name }] },
                    "status": { "phase": "Running", "conditions": [condition] },
                }),
            );
            endpoints.push(json!({
                "addresses": [format!("10.0.{}.{}", index / 250, index % 250 + 1)],
                "conditions": { "ready": is_ready, "serving": is_ready, "terminating": false },
                "targetRef": { "kind": "Pod", "namespace": namespace, "name": pod },
            }));
        }
        self.object(
            &format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{name}-abcde"),
            json!({
                "metadata": { "labels": { "kubernetes.io/service-name": name } },
                "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
            }),
        );
    }
}

impl Shared {
    fn answer(&self, request: &Request) -> Reply {
        let fault = {
            let mut state = lock(&self.state);
            state.requests.push(format!("{} {}", request.method, request.path));
            let matching = state.faults.iter().filter(|(prefix, _)| request.path.starts_with(prefix.as_str()));
            matching.max_by_key(|(prefix, _)| prefix.len()).map(|(_, fault)| *fault)
        };
        match fault {
            None => self.handle(request),
            Some(Fault::Garbage) => Reply::typed(200, "text/html", "<html>not Kubernetes</html>\n"),
            Some(Fault::Hang) => Reply::Hang,
            Some(Fault::HangInBody) => Reply::HangInBody,
            Some(Fault::Reset) => Reply::Reset,
            Some(Fault::Status(code)) => {
                let message = format!("the stand-in answers {code} as it was told to");
                let reply = Reply::json(code, &status(code, reason(code), &message));
                if code == 429 { reply.with_header("Retry-After", "1") } else { reply }
            }
            Some(Fault::Truncated) => Reply::Truncate,
        }
    }

    /// Discovery of an aggregated API: there is one while its APIService is available, and trusts who made the certificate.
    fn aggregated(&self, request: &Request) -> Option<Reply> {
        let (group, version) = request.route().strip_prefix("/apis/")?.split_once('/')?;
        let place = format!("/apis/apiregistration.k8s.io/v1/apiservices/{version}.{group}");
        let service = lock(&self.store).get(&place)?.clone();
        let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let available = conditions.iter().any(|it| it["type"] == "Available" && it["status"] == "True");
        let list = json!({ "kind": "APIResourceList", "apiVersion": "v1", "resources": [] });
        let refused = |why: &str| Some(Reply::json(503, &status(503, reason(503), why)));
        let secret = "/api/v1/namespaces/custom-metrics/secrets/custom-metrics-apiserver-certificate";
        let authority = lock(&self.store).get(secret).map(|secret| secret["data"]["ca.crt"].clone());
        match (available, authority == Some(service["spec"]["caBundle"].clone())) {
            (false, _) => refused("the server is currently unable to handle the request"),
            (true, false) => refused(
                "error trying to reach service: tls: failed to verify certificate: x509: certificate signed by unknown authority",
            ),
            (true, true) => Some(Reply::json(200, &list)),
        }
    }

    fn handle(&self, request: &Request) -> Reply {
        let (is_known, is_forbidden) = {
            let state = lock(&self.state);
            let token = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
            let is_forbidden = state.forbidden.iter().any(|prefix| request.path.starts_with(prefix.as_str()));
            (state.tokens.iter().any(|known| Some(known.as_str()) == token), is_forbidden)
        };
        if !is_known {
            return Reply::json(401, &status(401, "Unauthorized", "Unauthorized"));
        }
        if let Some(reply) = self.aggregated(request) {
            return reply;
        }
        let Some(path) = ApiPath::parse(request.route()) else {
            let message = "the server could not find the requested resource";
            return Reply::json(404, &status(404, "NotFound", message));
        };
        if is_forbidden {
            return Reply::json(403, &status(403, "Forbidden", &path.forbidden(verb(&request.method, &path))));
        }
        match (request.method.as_str(), request.route()) {
            ("POST", ACCESS_REVIEWS) => reviews::access(&request.body, &lock(&self.authorizer)),
            ("POST", OWN_REVIEWS) => reviews::own(&request.body, &lock(&self.state).forbidden),
            ("POST", TOKEN_REVIEWS) => reviews::token(&request.body, &lock(&self.state).users),
            _ => lock(&self.store).answer(request, &path),
        }
    }
}

fn verb(method: &str, path: &ApiPath) -> &'static str {
    match method {
        "GET" if path.name.is_none() => "list",
        "GET" => "get",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        _ => "delete",
    }
}
