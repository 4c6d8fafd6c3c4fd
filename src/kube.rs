//! The few questions put to the Kubernetes API, by hand.
//!
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
use crate::error::{Error, Reason, Result, quoted, refusal};
use crate::lock;
use crate::requestheader::RequestHeader;
use crate::route::Resource;
use crate::tls::{Roots, agent, certificates, explain};

const TIMEOUT: Duration = Duration::from_secs(5);
const LARGEST_ANSWER: u64 = 8 * 1024 * 1024;
pub(crate) const FULL: &str = "application/json";
/// Metadata instead of the whole object: a Deployment's pod template can be large, and is nobody's business here.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

/// The Kubernetes API, asked as the adapter's service account.
pub struct Kube {
    base: Option<String>,
    directory: PathBuf,
    agent: Mutex<Option<(Vec<u8>, Agent)>>,
}

impl Kube {
    /// Uses the API server and the service account directory of `config`.
    pub fn new(config: &Config) -> Self {
        Self { base: config.kubernetes.clone(), directory: config.service_account_dir.clone(), agent: Mutex::new(None) }
    }

    /// Makes sure that the object exists. Errors: it does not, or the API cannot tell.
    pub fn check_object(&self, resource: &Resource, namespace: &str, name: &str) -> Result<()> {
        let path = path(resource, namespace, name);
        self.call(Method::GET, &path, METADATA, None, &named(resource, namespace, name)).map(|_| ())
    }

    /// How many of the object's pods are Ready; None where an object does not tell.
    /// Errors: it does not exist, or the API cannot tell.
    pub fn ready_pods(&self, resource: &Resource, namespace: &str, name: &str) -> Result<Option<u64>> {
        if *resource == Resource::SERVICES {
            return self.ready_endpoints(namespace, name).map(Some);
        }
        if *resource == Resource::NAMESPACES {
            return Ok(None);
        }
        let path = path(resource, namespace, name);
        let object = self.call(Method::GET, &path, FULL, None, &named(resource, namespace, name))?;
        if *resource == Resource::PODS {
            return Ok(Some(u64::from(is_ready(&object))));
        }
        Ok(Some(object.pointer(resource.ready).and_then(Value::as_u64).unwrap_or(0)))
    }

    /// The pods behind a Service, as its EndpointSlices list them; each counts once, whatever the
    /// number of ports and address families.
    fn ready_endpoints(&self, namespace: &str, service: &str) -> Result<u64> {
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}"
        );
        let what = format!("the EndpointSlices of Service {service} in namespace {namespace}");
        let slices = self.call(Method::GET, &path, FULL, None, &what)?;
        let endpoints = items(&slices, "/items").flat_map(|slice| items(slice, "/endpoints"));
        let ready = endpoints.filter(|endpoint| endpoint.pointer("/conditions/ready") != Some(&Value::Bool(false)));
        let names: BTreeSet<&str> = ready
            .filter_map(|endpoint| endpoint.pointer("/targetRef/name").or_else(|| endpoint.pointer("/addresses/0")))
            .filter_map(Value::as_str)
            .collect();
        Ok(names.len() as u64)
    }

    /// The request header configuration, from its ConfigMap.
    /// Errors: it cannot be read or understood; the message names the mend.
    pub fn request_header(&self) -> Result<RequestHeader> {
        let what = "ConfigMap kube-system/extension-apiserver-authentication";
        let config_map = self.call(Method::GET, REQUEST_HEADER, FULL, None, what).map_err(|mut error| {
            if error.reason == Reason::KubernetesForbidden {
                error.message =
                    format!("{}: RoleBinding custom-metrics-auth-reader is missing in kube-system", error.message);
            }
            error
        })?;
        RequestHeader::parse(&config_map).map_err(|mistake| unavailable(&format!("{what}: {mistake}")))
    }

    /// The namespace that the adapter runs in.
    pub fn own_namespace(&self) -> String {
        let text = self.file("namespace").ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        if text.trim().is_empty() { "custom-metrics".to_owned() } else { text.trim().to_owned() }
    }

    /// One call whose answer is an object. `what` names its subject for the reader of an error.
    /// Errors: [`Reason::ObjectNotFound`], [`Reason::KubernetesForbidden`] or [`Reason::KubernetesUnavailable`].
    pub fn call(&self, method: Method, path: &str, accept: &str, body: Option<&Value>, what: &str) -> Result<Value> {
        let (status, answer) = self.exchange(method, path, accept, body)?;
        match status {
            200 | 201 => serde_json::from_slice(&answer).map_err(|_| unavailable("its answer is not JSON")),
            401 => Err(unavailable("it does not accept the service account token (401)")),
            403 => Err(refusal!(
                KubernetesForbidden,
                "the adapter lacks a permission for {what}, kubectl apply -f manifests/01-sysdig-metrics-rbac.yml \
                     restores its roles ({})",
                quoted(&message(&answer))
            )),
            409 => Err(refusal!(KubernetesConflict, "{what} was changed by others meanwhile")),
            404 => Err(refusal!(ObjectNotFound, "{what} does not exist")),
            other => Err(unavailable(&format!("it answers {other}: {}", quoted(&message(&answer))))),
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

    /// The client for the CA of this moment.
    fn agent(&self) -> Result<Agent> {
        let ca = self.file("ca.crt")?;
        let mut cached = lock(&self.agent);
        if let Some((known, agent)) = cached.as_ref()
            && *known == ca
        {
            return Ok(agent.clone());
        }
        let roots = certificates(&ca).map_err(|mistake| unavailable(&format!("ca.crt holds {mistake}")))?;
        let made = agent(Roots::Given(roots), TIMEOUT, None);
        *cached = Some((ca, made.clone()));
        Ok(made)
    }
}

fn unavailable(why: &str) -> Error {
    refusal!(KubernetesUnavailable, "the Kubernetes API cannot be asked: {why}")
}

fn named(resource: &Resource, namespace: &str, name: &str) -> String {
    let place = if *resource == Resource::NAMESPACES { String::new() } else { format!(" in namespace {namespace}") };
    format!("{} {name}{place}", resource.kind)
}

fn path(resource: &Resource, namespace: &str, name: &str) -> String {
    let Resource { plural, group, api_version, .. } = resource;
    let base = if group.is_empty() { "/api" } else { "/apis" };
    if *resource == Resource::NAMESPACES {
        return format!("{base}/{api_version}/{plural}/{name}");
    }
    format!("{base}/{api_version}/namespaces/{namespace}/{plural}/{name}")
}

fn message(body: &[u8]) -> String {
    let status: Option<Value> = serde_json::from_slice(body).ok();
    let message = status.as_ref().and_then(|status| status.pointer("/message")).and_then(Value::as_str);
    message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned)
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn is_ready(pod: &Value) -> bool {
    items(pod, "/status/conditions").any(|condition| {
        condition.pointer("/type").and_then(Value::as_str) == Some("Ready")
            && condition.pointer("/status").and_then(Value::as_str) == Some("True")
    })
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
