//! The few questions put to the Kubernetes API, by hand. Token and CA are read from their files for every call, since both
//! rotate. No proxy is used. Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/>.

use crate::prelude::*;
use crate::{requestheader::RequestHeader, sysdig::remark, tls::agent, tls::certificates, tls::exchange, tls::explain};

/// Restores roles, and APIServices.
pub(crate) const ROLES: &str = "kubectl apply -f manifests/01-sysdig-metrics-rbac.yml";
/// Less than a reader waits, who is told then that it was not Sysdig.
const TIMEOUT: Duration = Duration::from_secs(4);
/// How long an object is known to be there, which there are and how many of their pods are Ready, and that one is not.
const NAMES: Duration = Duration::from_secs(60);
const READY: Duration = Duration::from_secs(20);
const MISSING: Duration = Duration::from_secs(5);
const PAGE: usize = 500;
/// Of whole objects, which are larger.
const FULL_PAGE: usize = 100;
const MOST_PAGES: usize = 40;
/// Metadata instead of whole objects: a Deployment's pod template can be large, and is nobody's business here.
const METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
const REQUEST_HEADER: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

pub struct Kube {
    pub(crate) config: Config,
    agent: Mutex<Option<(Vec<u8>, ureq::Agent)>>,
    /// By path, with the time of the answer.
    lists: Mutex<BTreeMap<String, (Instant, Objects)>>,
}

/// Objects by namespace and name.
pub type Objects = Arc<BTreeMap<Object, Ready>>;

/// The Ready pods of an object: how many, and of a Service which.
pub type Ready = (u64, BTreeSet<String>);

/// Adds what an object tells: a workload in its status, an EndpointSlice once for each port and address family.
fn add_ready((count, pods): &mut Ready, object: &Value) {
    *count += ["readyReplicas", "numberReady", "ready"].iter().find_map(|key| object["status"][key].as_u64()).unwrap_or(0);
    let ready = |endpoint: &&Value| endpoint["conditions"]["ready"] != false;
    let name = |it: &Value| Some(it.pointer("/targetRef/name").or_else(|| it.pointer("/addresses/0"))?.as_str()?.to_owned());
    pods.extend(items(object, "/endpoints").filter(ready).filter_map(name));
    *count = (*count).max(pods.len() as u64);
}

impl Kube {
    pub fn new(config: &Config) -> Self {
        Self { config: config.clone(), agent: Mutex::default(), lists: Mutex::default() }
    }

    /// The objects in `namespace`, or everywhere for an empty one, whose labels fit; of pods the unfinished. What is
    /// remembered counts, unless `wanted` is not in it. Errors: there are too many, or the API cannot tell.
    pub fn objects(&self, of: &Resource, namespace: &str, labels: &str, wanted: Option<&Object>) -> Result<Objects> {
        let unfinished = if *of == Resource::PODS { "status.phase!=Succeeded,status.phase!=Failed" } else { "" };
        let [labels, fields] = [labels, unfinished].map(percent_encode);
        let path = path(of, namespace, &format!("?limit={PAGE}&labelSelector={labels}&fieldSelector={fields}"));
        self.listed(&path, METADATA, if wanted.is_some() { NAMES } else { READY }, wanted, of)
    }

    /// The Ready pods of a workload or Service, out of such a list. Errors: the API cannot tell.
    pub fn ready(&self, resource: &Resource, namespace: &str, wanted: &Object) -> Result<Ready> {
        let resource = if *resource == Resource::SERVICES { &Resource::ENDPOINT_SLICES } else { resource };
        let path = path(resource, namespace, &format!("?limit={FULL_PAGE}"));
        Ok(self.listed(&path, JSON, READY, Some(wanted), resource)?.get(wanted).cloned().unwrap_or_default())
    }

    /// A list with all of its pages, remembered for `age`, or for less where `wanted` is missing in it.
    fn listed(&self, path: &str, form: &str, age: Duration, wanted: Option<&Object>, of: &Resource) -> Result<Objects> {
        let now = Instant::now();
        let age = |known: &Objects| if wanted.is_some_and(|it| !known.contains_key(it)) { MISSING } else { age };
        let fresh = |(at, known): &&(Instant, Objects)| now.duration_since(*at) < age(known);
        let known = lock(&self.lists).get(path).filter(fresh).map(|(_, known)| known.clone());
        if let Some(known) = known.filter(|_| !self.config.refresh_interval.is_zero()) {
            return Ok(known);
        }
        let (mut found, mut next) = (BTreeMap::<Object, Ready>::new(), String::new());
        for _ in 0..MOST_PAGES {
            let page = self.call(Method::GET, &format!("{path}{next}"), form, None, of.plural)?;
            for item in items(&page, "/items") {
                let slice = *of == Resource::ENDPOINT_SLICES;
                let name = if slice { "/metadata/labels/kubernetes.io~1service-name" } else { "/metadata/name" };
                let object = ["/metadata/namespace", name].map(|pointer| text(item, pointer).to_owned());
                add_ready(found.entry(object.into()).or_default(), item);
            }
            let Some(token) = page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) else {
                let (mut lists, found) = (lock(&self.lists), Arc::new(found));
                lists.retain(|_, (at, _)| now.duration_since(*at) < NAMES * 2);
                lists.insert(path.to_owned(), (now, found.clone()));
                return Ok(found);
            };
            next = format!("&continue={}", percent_encode(token));
        }
        Err(refusal!(InvalidRequest, "there are more than {} {}: select fewer", found.len(), of.plural))
    }

    /// Errors: the ConfigMap cannot be read or understood; the message names the mend.
    pub fn request_header(&self) -> Result<RequestHeader> {
        let what = "ConfigMap extension-apiserver-authentication (RoleBinding kube-system/custom-metrics-auth-reader)";
        let config_map = self.call(Method::GET, REQUEST_HEADER, JSON, None, what)?;
        RequestHeader::parse(&config_map).map_err(|mistake| unavailable(&format!("{what}: {mistake}")))
    }

    pub fn own_namespace(&self) -> String {
        let text = self.file("namespace").ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        if text.trim().is_empty() { "custom-metrics".to_owned() } else { text.trim().to_owned() }
    }

    /// One call whose answer is an object. `what` names its subject for the reader of an error.
    /// Errors: [`Reason::ObjectNotFound`], [`Reason::KubernetesForbidden`] or [`Reason::KubernetesUnavailable`].
    pub fn call(&self, method: Method, path: &str, accept: &str, body: Option<&Value>, what: &str) -> Result<Value> {
        metrics::timed("kubernetes_call_duration_seconds", "", || {
            let missing = "KUBERNETES_SERVICE_HOST is not set; the adapter runs in a pod with a service account";
            let base = self.config.kubernetes.as_ref().ok_or_else(|| unavailable(missing))?;
            let token = String::from_utf8(self.file("token")?).ok().and_then(|text| Secret::new(text.trim()));
            let token = token.ok_or_else(|| unavailable("the service account directory holds no usable token"))?;
            let kind = if method == Method::PATCH { "application/merge-patch+json" } else { JSON };
            let (url, body) = (format!("{base}{path}"), body.map(Value::to_string).unwrap_or_default());
            let sent = exchange(&self.agent()?, method, &url, &token, [accept, kind], body);
            let sent = sent.and_then(|answer| Ok((answer.status().as_u16(), answer.into_body()?)));
            let (status, answer) = sent.map_err(|error| unavailable(&explain(&error)))?;
            let says = || remark(&answer, &token);
            let mend = "restores its roles (custom resources: docs/definitions.md; explain: manifests/components/doctor-rbac)";
            Err(match status {
                200 | 201 => return serde_json::from_slice(&answer).map_err(|_| unavailable("its answer is not JSON")),
                400 if accept == METADATA && !path.contains("labelSelector=&") => {
                    refusal!(InvalidRequest, "the Kubernetes API does not understand the labelSelector: {}", says())
                }
                401 => unavailable("it does not accept the service account token (401)"),
                403 => refusal!(KubernetesForbidden, "the adapter lacks a permission for {what}, {ROLES} {mend} ({})", says()),
                409 => refusal!(KubernetesConflict, "{what} was changed by others meanwhile"),
                404 => refusal!(ObjectNotFound, "{what} does not exist"),
                other => unavailable(&format!("it answers {other}: {}", says())),
            })
        })
    }

    fn file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.config.service_account_dir.join(name);
        std::fs::read(&path).map_err(|error| unavailable(&format!("{}: {error}", path.display())))
    }

    fn agent(&self) -> Result<ureq::Agent> {
        let (ca, mut cached) = (self.file("ca.crt")?, lock(&self.agent));
        if let Some((_, agent)) = cached.as_ref().filter(|(known, _)| *known == ca) {
            return Ok(agent.clone());
        }
        let roots = certificates(&ca).map_err(|mistake| unavailable(&format!("ca.crt holds {mistake}")))?;
        Ok(cached.insert((ca, agent(Some(&roots), true, TIMEOUT, None))).1.clone())
    }
}

pub(crate) fn unavailable(why: &str) -> Error {
    refusal!(KubernetesUnavailable, "the Kubernetes API cannot be asked: {why}")
}

pub(crate) fn named(resource: &Resource, namespace: &str, name: &str) -> String {
    let place = if resource.is_namespaced() { format!(" in namespace {namespace}") } else { String::new() };
    format!("{} {name}{place}", resource.kind)
}

pub(crate) fn path(Resource { plural, api_version, .. }: &Resource, namespace: &str, rest: &str) -> String {
    let base = if api_version.contains('/') { "/apis" } else { "/api" };
    let place = if namespace.is_empty() { String::new() } else { format!("/namespaces/{namespace}") };
    format!("{base}/{api_version}{place}/{plural}{rest}")
}

pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_have_the_paths_of_their_api() {
        let table = [
            (Resource::NAMESPACES, "", "/api/v1/namespaces?x"),
            (Resource::PODS, "ns", "/api/v1/namespaces/ns/pods?x"),
            (Resource::PODS, "", "/api/v1/pods?x"),
            (Resource::SERVICES, "ns", "/api/v1/namespaces/ns/services?x"),
            (Resource::DEPLOYMENTS, "ns", "/apis/apps/v1/namespaces/ns/deployments?x"),
            (Resource::JOBS, "ns", "/apis/batch/v1/namespaces/ns/jobs?x"),
            (Resource::ENDPOINT_SLICES, "ns", "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices?x"),
        ];
        for (resource, namespace, expected) in table {
            assert_eq!(path(&resource, namespace, "?x"), expected);
        }
    }

    #[test]
    fn ready_pods_are_those_that_a_workload_counts_or_a_slice_names() {
        let ready = |objects: &[Value]| {
            let mut ready = Ready::default();
            objects.iter().for_each(|object| add_ready(&mut ready, object));
            ready.0
        };
        for (status, expected) in [
            (json!({ "readyReplicas": 3, "replicas": 5 }), 3),
            (json!({ "numberReady": 2 }), 2),
            (json!({ "ready": 1 }), 1),
            (json!({ "replicas": 5 }), 0),
            (json!({ "readyReplicas": "3" }), 0),
            (json!(null), 0),
        ] {
            assert_eq!(ready(&[json!({ "status": status })]), expected);
        }
        let endpoint = |name: &str, ready: Value| json!({ "targetRef": { "name": name }, "conditions": { "ready": ready } });
        let both = json!({ "endpoints": [endpoint("a", json!(true)), endpoint("b", json!(false)), endpoint("c", json!(null))] });
        let address = json!({ "endpoints": [{ "addresses": ["10.0.0.1"] }] });
        assert_eq!(ready(&[both.clone(), both, address]), 3, "the same pod counts once, and what says nothing is ready");
    }
}
