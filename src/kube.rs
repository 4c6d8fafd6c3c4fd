//! The few questions put to the Kubernetes API, by hand.
//! Token and CA are read from their files for every call, since both rotate. No proxy is used.
//! Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/>.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::{Method, Request};

use crate::config::{Config, Secret};
use crate::error::{Error, Result, quoted, refusal};
use crate::lock;
use crate::requestheader::RequestHeader;
use crate::route::{Resource, percent_encode};
use crate::sysdig::remark;
use crate::tls::{agent, certificates, explain};

const TIMEOUT: Duration = Duration::from_secs(5);
const LARGEST_ANSWER: u64 = 8 * 1024 * 1024;
pub(crate) const FULL: &str = "application/json";
/// Metadata instead of the whole object: a Deployment's pod template can be large, and is nobody's business here.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
/// As many as one page of Sysdig's answers holds.
pub const MOST_OBJECTS: usize = 1000;
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

pub struct Kube {
    base: Option<String>,
    directory: PathBuf,
    agent: Mutex<Option<(Vec<u8>, Agent)>>,
}

impl Kube {
    pub fn new(config: &Config) -> Self {
        Self { base: config.kubernetes.clone(), directory: config.service_account_dir.clone(), agent: Mutex::new(None) }
    }

    /// Makes sure that the object exists. Errors: it does not, or the API cannot tell.
    pub fn check_object(&self, resource: &Resource, namespace: &str, name: &str) -> Result<()> {
        let path = path(resource, namespace, name);
        self.call(Method::GET, &path, METADATA, None, &named(resource, namespace, name)).map(|_| ())
    }

    /// The names of the objects whose labels fit `selector`; of the pods, those that have not finished.
    /// Errors: there are none, there are more than [`MOST_OBJECTS`], or the API cannot tell.
    pub fn names(&self, resource: &Resource, namespace: &str, selector: &str) -> Result<Vec<String>> {
        let what = format!("{} of namespace {namespace:?} with labels {selector:?}", resource.plural);
        let unfinished = "status.phase!=Succeeded,status.phase!=Failed";
        let fields = if *resource == Resource::PODS { percent_encode(unfinished) } else { String::new() };
        let query = format!("?limit={MOST_OBJECTS}&labelSelector={}&fieldSelector={fields}", percent_encode(selector));
        let list = self.call(Method::GET, &path(resource, namespace, &query), METADATA_LIST, None, &what)?;
        let names = items(&list, "/items").filter_map(|it| it.pointer("/metadata/name")?.as_str());
        let names: Vec<String> = names.map(str::to_owned).collect();
        match (names.is_empty(), list["metadata"]["continue"].as_str().is_none_or(str::is_empty)) {
            (true, _) => Err(refusal!(ObjectNotFound, "there are no {what}")),
            (_, true) => Ok(names),
            _ => Err(refusal!(InvalidRequest, "there are more than {MOST_OBJECTS} {what}: select fewer")),
        }
    }

    /// How many of the object's pods are Ready; None where an object does not tell. Errors: the API cannot tell.
    pub fn ready_pods(&self, resource: &Resource, namespace: &str, name: &str) -> Result<Option<u64>> {
        let what = named(resource, namespace, name);
        let object = || self.call(Method::GET, &path(resource, namespace, name), FULL, None, &what);
        Ok(Some(match *resource {
            Resource::SERVICES => self.ready_endpoints(namespace, name)?.len() as u64,
            Resource::PODS => u64::from(is_ready(&object()?)),
            _ if !resource.is_namespaced() => return Ok(None),
            _ => object()?.pointer(resource.ready).and_then(Value::as_u64).unwrap_or(0),
        }))
    }

    /// The Ready pods behind a Service, as its EndpointSlices list them, once for each port and address family.
    pub fn ready_endpoints(&self, namespace: &str, service: &str) -> Result<BTreeSet<String>> {
        let query = format!("endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}");
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/{query}");
        let what = format!("the EndpointSlices of Service {service} in namespace {namespace}");
        let slices = self.call(Method::GET, &path, FULL, None, &what)?;
        let endpoints = items(&slices, "/items").flat_map(|slice| items(slice, "/endpoints"));
        let ready = endpoints.filter(|endpoint| endpoint.pointer("/conditions/ready") != Some(&Value::Bool(false)));
        let names =
            ready.filter_map(|it| it.pointer("/targetRef/name").or_else(|| it.pointer("/addresses/0"))?.as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// The request header configuration, from its ConfigMap.
    /// Errors: it cannot be read or understood; the message names the mend.
    pub fn request_header(&self) -> Result<RequestHeader> {
        let what =
            "ConfigMap extension-apiserver-authentication (RoleBinding custom-metrics-auth-reader in kube-system)";
        let config_map = self.call(Method::GET, REQUEST_HEADER, FULL, None, what)?;
        RequestHeader::parse(&config_map).map_err(|mistake| unavailable(&format!("{what}: {mistake}")))
    }

    pub fn own_namespace(&self) -> String {
        let text = self.file("namespace").ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        if text.trim().is_empty() { "custom-metrics".to_owned() } else { text.trim().to_owned() }
    }

    /// One call whose answer is an object. `what` names its subject for the reader of an error.
    /// Errors: [`Reason::ObjectNotFound`], [`Reason::KubernetesForbidden`] or [`Reason::KubernetesUnavailable`].
    pub fn call(&self, method: Method, path: &str, accept: &str, body: Option<&Value>, what: &str) -> Result<Value> {
        let (status, answer) = self.exchange(method, path, accept, body)?;
        let says = || quoted(&remark(&answer));
        match status {
            400 if accept == METADATA_LIST => {
                Err(refusal!(InvalidRequest, "the Kubernetes API does not understand {what}: {}", says()))
            }
            200 | 201 => serde_json::from_slice(&answer).map_err(|_| unavailable("its answer is not JSON")),
            401 => Err(unavailable("it does not accept the service account token (401)")),
            403 => Err(refusal!(
                KubernetesForbidden,
                "the adapter lacks a permission for {what}, kubectl apply -f manifests/01-sysdig-metrics-rbac.yml \
                 restores its roles ({})",
                says()
            )),
            409 => Err(refusal!(KubernetesConflict, "{what} was changed by others meanwhile")),
            404 => Err(refusal!(ObjectNotFound, "{what} does not exist")),
            other => Err(unavailable(&format!("it answers {other}: {}", says()))),
        }
    }

    fn exchange(&self, method: Method, path: &str, accept: &str, body: Option<&Value>) -> Result<(u16, Vec<u8>)> {
        let missing = "KUBERNETES_SERVICE_HOST is not set; the adapter runs in a pod with a service account";
        let base = self.base.as_ref().ok_or_else(|| unavailable(missing))?;
        let token = self.file("token")?;
        let token = std::str::from_utf8(&token).ok().and_then(|text| Secret::new(text.trim()));
        let token = token.ok_or_else(|| unavailable("the service account directory holds no usable token"))?;
        let content_type = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let request = Request::builder()
            .method(method)
            .uri(format!("{base}{path}"))
            .header("Accept", accept)
            .header("Authorization", format!("Bearer {}", token.expose()))
            .header("Content-Type", content_type)
            .body(body.map(Value::to_string).unwrap_or_default())
            .map_err(|error| unavailable(&error.to_string()))?;
        let mut response = self.agent()?.run(request).map_err(|error| unavailable(&explain(&error)))?;
        let answer = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        Ok((response.status().as_u16(), answer.map_err(|error| unavailable(&explain(&error)))?))
    }

    fn file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.directory.join(name);
        std::fs::read(&path).map_err(|error| unavailable(&format!("{}: {error}", path.display())))
    }

    fn agent(&self) -> Result<Agent> {
        let ca = self.file("ca.crt")?;
        let mut cached = lock(&self.agent);
        if let Some((known, agent)) = cached.as_ref()
            && *known == ca
        {
            return Ok(agent.clone());
        }
        let roots = certificates(&ca).map_err(|mistake| unavailable(&format!("ca.crt holds {mistake}")))?;
        let made = agent(Some(&roots), TIMEOUT, None);
        *cached = Some((ca, made.clone()));
        Ok(made)
    }
}

pub(crate) fn unavailable(why: &str) -> Error {
    refusal!(KubernetesUnavailable, "the Kubernetes API cannot be asked: {why}")
}

pub(crate) fn named(resource: &Resource, namespace: &str, name: &str) -> String {
    let place = if resource.is_namespaced() { format!(" in namespace {namespace}") } else { String::new() };
    format!("{} {name}{place}", resource.kind)
}

fn path(resource: &Resource, namespace: &str, name: &str) -> String {
    let Resource { plural, group, api_version, .. } = resource;
    let base = if group.is_empty() { "/api" } else { "/apis" };
    let place = if resource.is_namespaced() { format!("/namespaces/{namespace}") } else { String::new() };
    let slash = if name.starts_with('?') { "" } else { "/" };
    format!("{base}/{api_version}{place}/{plural}{slash}{name}")
}

pub(crate) fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn is_ready(pod: &Value) -> bool {
    items(pod, "/status/conditions").any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_have_the_paths_of_their_api() {
        let table = [
            (Resource::NAMESPACES, "/api/v1/namespaces/n"),
            (Resource::PODS, "/api/v1/namespaces/ns/pods/n"),
            (Resource::SERVICES, "/api/v1/namespaces/ns/services/n"),
            (Resource::DEPLOYMENTS, "/apis/apps/v1/namespaces/ns/deployments/n"),
            (Resource::JOBS, "/apis/batch/v1/namespaces/ns/jobs/n"),
        ];
        for (resource, expected) in table {
            assert_eq!(path(&resource, "ns", "n"), expected);
        }
    }

    #[test]
    fn a_pod_is_ready_by_its_condition() {
        let pod = |kind, status| json!({ "status": { "conditions": [{ "type": kind, "status": status }] } });
        assert!(is_ready(&pod("Ready", "True")));
        for other in [pod("Ready", "False"), pod("Ready", "Unknown"), pod("Initialized", "True"), json!({}), json!([])]
        {
            assert!(!is_ready(&other), "{other}");
        }
    }
}
