//! From a request line to a typed [`Route`]: pure, one match, nothing half understood.
//! Source: <https://github.com/kubernetes/metrics/tree/master/pkg/apis>.

use crate::prelude::*;
use crate::{definitions, discovery, selector};
use serde::Deserialize;

const PLACES: &str = "namespaces/NAMESPACE/RESOURCE/NAME/METRIC, namespaces/NAME/metrics/METRIC or nodes/NAME/METRIC";
const LONGEST_TARGET: usize = 8 * 1024;
pub(crate) const LONGEST_METRIC: usize = 253;

/// An API group and a version of it.
pub type Api = (&'static str, &'static str);

/// The group of metrics that describe objects, and that of those that describe none.
pub const GROUP: &str = "custom.metrics.k8s.io";
pub const EXTERNAL: &str = "external.metrics.k8s.io";
/// What is served, what current autoscalers prefer first. The last is off unless it is asked for.
pub const APIS: [Api; 3] = [(GROUP, "v1beta2"), (GROUP, "v1beta1"), (EXTERNAL, "v1beta1")];

/// Not spelt out in what serde reads, which would borrow it.
type Word = &'static str;

/// A Kubernetes resource: what Kubernetes and Sysdig call it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Resource {
    #[serde(deserialize_with = "definitions::word")]
    pub kind: Word,
    #[serde(deserialize_with = "definitions::plural")]
    pub plural: Word,
    /// `v1`, or with a group `apps/v1`
    #[serde(deserialize_with = "definitions::word")]
    pub api_version: Word,
    /// Sysdig's label with an object's name; empty where there are no metrics.
    #[serde(deserialize_with = "definitions::word")]
    pub label: Word,
    /// Sysdig's workload type; empty for what is no workload.
    #[serde(skip)]
    pub workload_type: Word,
}

macro_rules! resources {
    ($($name:ident: $kind:literal $plural:literal $version:literal $label:literal $type:literal;)+) => {
        impl Resource {
            $(pub const $name: Self =
                Self { kind: $kind, plural: $plural, api_version: $version, label: $label, workload_type: $type };)+
            pub(crate) const KNOWN: [&'static Self; 14] = [$(&Self::$name),+];
        }
    };
}

// What autoscalers are pointed at most first.
resources! {
    SERVICES: "Service" "services" "v1" "kubernetes.service.name" "";
    PODS: "Pod" "pods" "v1" "kubernetes.pod.name" "";
    DEPLOYMENTS: "Deployment" "deployments" "apps/v1" "kubernetes.deployment.name" "deployment";
    STATEFUL_SETS: "StatefulSet" "statefulsets" "apps/v1" "kubernetes.statefulSet.name" "statefulset";
    DAEMON_SETS: "DaemonSet" "daemonsets" "apps/v1" "kubernetes.daemonSet.name" "daemonset";
    REPLICA_SETS: "ReplicaSet" "replicasets" "apps/v1" "kubernetes.replicaSet.name" "replicaset";
    JOBS: "Job" "jobs" "batch/v1" "kubernetes.job.name" "job";
    NODES: "Node" "nodes" "v1" "kubernetes.node.name" "";
    NAMESPACES: "Namespace" "namespaces" "v1" "kubernetes.namespace.name" "";
    CLUSTER: "Cluster" "clusters" "v1" "" "";
    OLD_DEPLOYMENTS: "Deployment" "deployments" "extensions/v1beta1" "kubernetes.deployment.name" "deployment";
    OLD_DAEMON_SETS: "DaemonSet" "daemonsets" "extensions/v1beta1" "kubernetes.daemonSet.name" "daemonset";
    OLD_REPLICA_SETS: "ReplicaSet" "replicasets" "extensions/v1beta1" "kubernetes.replicaSet.name" "replicaset";
    ENDPOINT_SLICES: "EndpointSlice" "endpointslices" "discovery.k8s.io/v1" "" "";
}

/// Objects of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Select {
    pub resource: &'static Resource,
    /// Empty for what lies in none.
    pub namespace: String,
    /// `*` for all whose labels fit.
    pub name: String,
    pub labels: String,
}

/// The question of one metric of one object, or of all that a selector names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub api: Api,
    /// The object's namespace; for a namespace its own name, empty for nodes.
    pub namespace: String,
    pub described: &'static Resource,
    /// The name as asked: `kuard`, `deployment;kuard`, or `*` for all.
    pub name: String,
    /// What is measured: for `services/deployment;kuard` the Deployment `kuard`.
    pub select: Select,
    pub metric: String,
    /// The selector of the metric, reserved keys included.
    pub selector: Vec<Requirement>,
    /// Verb, resource, subresource and name as the API server authorizes them: a metric is a subresource of its object.
    pub access: [String; 4],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// What nobody needs to be asked for.
    Document(String),
    /// For anybody: `version`; `healthz` and `livez`: it works; `readyz`: it can be sent requests. True with `?verbose`.
    Open(String, bool),
    Read(Box<Read>),
    /// `/apis/GROUP/VERSION`
    Resources(Api),
    Metrics,
}

impl Resource {
    /// Those that have metrics, each under its current group.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        Self::KNOWN.into_iter().filter(|it| !it.label.is_empty() && it.api_version != "extensions/v1beta1")
    }

    /// Whether an object of it tells how many of its pods are Ready.
    pub fn counts_pods(&self) -> bool {
        *self == Self::SERVICES || !self.workload_type.is_empty()
    }

    /// Empty for Kubernetes' first.
    pub fn group(&self) -> &'static str {
        self.api_version.rsplit_once('/').map_or("", |(group, _)| group)
    }

    /// `pods`, `deployments.apps`
    pub fn qualified(&self) -> String {
        self.api_version.split_once('/').map_or_else(|| self.plural.to_owned(), |(group, _)| format!("{}.{group}", self.plural))
    }

    pub fn is_namespaced(&self) -> bool {
        ![Self::NODES, Self::NAMESPACES, Self::CLUSTER].contains(self)
    }

    /// `pods`, `deployments` or `deployments.apps`; the old group of the same objects counts as well.
    fn namespaced(text: &str, custom: &'static [Self]) -> Result<&'static Self, Error> {
        let known = || Self::all().map(Self::qualified).collect::<Vec<_>>().join(", ");
        let mut groups = Self::KNOWN.into_iter().filter(|it| !it.label.is_empty()).chain(custom);
        match Self::all().find(|it| it.plural == text).or_else(|| groups.find(|it| it.qualified() == text)) {
            Some(resource) if resource.is_namespaced() => Ok(resource),
            Some(Self { plural, .. }) => Err(refusal!(InvalidRequest, "{plural} are read at {plural}/NAME/METRIC")),
            None => Err(refusal!(NotFound, "no metrics are served for resource {}: use one of {}", quoted(text), known())),
        }
    }

    /// What the old adapter names `deployment;kuard`.
    fn workload(kind: &str) -> Result<&'static Self, Error> {
        let found = Self::all().find(|it| !kind.is_empty() && it.workload_type.eq_ignore_ascii_case(kind));
        let (what, known) = (quoted(kind), "deployment, statefulset, daemonset, replicaset or job");
        found.ok_or_else(|| refusal!(InvalidRequest, "{what} is no workload type: TYPE;NAME takes {known}"))
    }
}

/// Understands a request line, where these resources are defined besides. Errors name what is wrong and what is served.
pub fn route(method: &str, target: &str, external: bool, custom: &'static [Resource]) -> Result<Route, Error> {
    ensure!(target.len() <= LONGEST_TARGET, InvalidRequest, "path and query are longer than {LONGEST_TARGET} bytes");
    // Where the whole can be decoded, each part can.
    ensure!(percent_decode(target).is_some(), InvalidRequest, "{} is not valid percent-encoding", quoted(target));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pair = |text: &str| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        percent_decode(key).zip(percent_decode(value))
    };
    let (segments, query) = (segments(path)?, query.replace('+', " ").split('&').filter_map(pair).collect::<Vec<_>>());
    let api = |group, version| APIS.into_iter().find(|api| *api == (group, version) && (external || group != EXTERNAL));
    let verbose = || query.iter().any(|(key, _)| key == "verbose");
    let found = match *segments.iter().map(String::as_str).collect::<Vec<_>>() {
        [name @ ("healthz" | "livez" | "readyz" | "version")] => Some(Route::Open(name.to_owned(), verbose())),
        ["metrics"] => Some(Route::Metrics),
        ["apis", group, version] => api(group, version).map(Route::Resources),
        ["apis", group, version, ref rest @ ..] => api(group, version).map_or(Ok(None), |api| read(api, rest, custom, &query))?,
        _ => discovery::document(&format!("/{}", segments.join("/")), external).map(Route::Document),
    };
    let route = found.ok_or_else(|| refusal!(NotFound, "nothing is served at {}; / lists what is", quoted(path)))?;
    if method == "GET" { Ok(route) } else { Err(read_only(method)) }
}

pub(crate) fn read_only(method: &str) -> Error {
    refusal!(MethodNotAllowed, "{} is not allowed: metrics are read-only, use GET", quoted(method))
}

/// What is asked of an API below its path; None if nothing is served there.
fn read(api: Api, rest: &[&str], custom: &'static [Resource], query: &[(String, String)]) -> Result<Option<Route>> {
    let external = api.0 == EXTERNAL;
    let (namespace, described, name, metric, access) = match *rest {
        ["namespaces", name, metric] => (name, &Resource::NAMESPACES, name, metric, Some(["list", metric, "", ""])),
        _ if external => return Ok(None),
        ["namespaces", name, "metrics", id] => (name, &Resource::NAMESPACES, name, id, Some(["get", "metrics", "", id])),
        ["namespaces", place, resource, name, id] => (place, Resource::namespaced(resource, custom)?, name, id, None),
        ["nodes", name, metric] => ("", &Resource::NODES, name, metric, None),
        ["namespaces"] | ["namespaces", _] | ["namespaces", _, _, _] => return Ok(None),
        _ => return Err(refusal!(InvalidRequest, "a metric is read at {PLACES}")),
    };
    let watched = query.iter().any(|(key, value)| key == "watch" && !matches!(value.trim(), "false" | "0"));
    ensure!(!watched, InvalidRequest, "metrics cannot be watched");
    ensure!(is_metric_id(metric), InvalidRequest, "{} is not a metric id: letters, digits, _ . : - only", quoted(metric));
    let (resource, object) = match name.split_once(';') {
        Some((kind, object)) if *described == Resource::SERVICES => (Resource::workload(kind)?, object),
        _ => (Resource::workload(described.workload_type).unwrap_or(described), name),
    };
    let all = name == "*" && !external;
    let namespace = if all && *described == Resource::NAMESPACES { "" } else { namespace };
    let placed = namespace.is_empty() || is_name(namespace, 63);
    ensure!(placed, InvalidRequest, "{} is not a Kubernetes namespace", quoted(namespace));
    ensure!(all || is_name(object, 253), InvalidRequest, "{} is not a Kubernetes name", quoted(object));
    // A selector given twice must hold twice.
    let selector = |wanted: &str| {
        let given = query.iter().filter(|(key, value)| key == wanted && !value.trim().is_empty());
        given.map(|(_, value)| value.trim()).collect::<Vec<_>>().join(",")
    };
    let labels = if external { String::new() } else { selector("labelSelector") };
    ensure!(all || labels.is_empty(), InvalidRequest, "labelSelector selects objects: it takes * in place of {name}");
    let selector = selector::parse(&selector(if external { "labelSelector" } else { "metricLabelSelector" }))?;
    let (place, whole) = (if resource.is_namespaced() { namespace } else { "" }, described.qualified());
    let select = Select { resource, namespace: place.to_owned(), name: object.to_owned(), labels };
    let access = access.unwrap_or(["get", &whole, metric, name]).map(str::to_owned);
    let [namespace, name, metric] = [namespace, name, metric].map(str::to_owned);
    Ok(Some(Route::Read(Box::new(Read { api, namespace, described, name, select, metric, selector, access }))))
}

/// Nothing else can name an object, so nothing else reaches a query.
pub(crate) fn is_name(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// Whether a metric of this name can be asked for.
pub fn is_metric_id(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric();
    text.len() <= LONGEST_METRIC && text.contains(plain) && text.chars().all(|c| plain(c) || "_.:-".contains(c))
}

/// The decoded segments of a path. One trailing slash is no segment.
fn segments(path: &str) -> Result<Vec<String>, Error> {
    let rest = path.strip_prefix('/').ok_or_else(|| refusal!(InvalidRequest, "the path does not start with /"))?;
    let segment = |text: &str| {
        let decoded = percent_decode(text).unwrap_or_default();
        let mistake = match decoded.as_str() {
            "" => "an empty segment",
            "." | ".." => ". or .. segments",
            name if name.contains(|c: char| c == '/' || c.is_control()) => "a character that cannot be in a name",
            _ => return Ok(decoded),
        };
        Err(refusal!(InvalidRequest, "the path holds {mistake}: {}", quoted(&decoded)))
    };
    rest.strip_suffix('/').unwrap_or(rest).split('/').filter(|_| !rest.is_empty()).map(segment).collect()
}

/// Decodes `%2A`. None if it is broken or not UTF-8.
pub fn percent_decode(text: &str) -> Option<String> {
    let (mut bytes, mut decoded) = (text.bytes(), Vec::with_capacity(text.len()));
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        decoded.push(if byte == b'%' { u8::try_from(digit()? * 16 + digit()?).ok()? } else { byte });
    }
    String::from_utf8(decoded).ok()
}

/// Encodes what could mean something in a query.
pub fn percent_encode(text: impl AsRef<[u8]>) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.as_ref().iter().map(|&b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    fn read_of(target: &str) -> Result<Read, Error> {
        match route("GET", target, true, &[])? {
            Route::Read(read) => Ok(*read),
            other => panic!("{target} is {other:?}"),
        }
    }

    #[test]
    fn documents_have_their_paths() {
        let document = |path: &str| Route::Document(discovery::document(path, false).unwrap());
        let table = [
            ("/", document("/")),
            ("/apis", document("/apis")),
            ("/apis/", document("/apis")),
            ("/apis/custom.metrics.k8s.io", document("/apis/custom.metrics.k8s.io")),
            ("/apis/custom.metrics.k8s.io/v1beta1", Route::Resources((GROUP, "v1beta1"))),
            ("/apis/custom.metrics.k8s.io/v1beta2/", Route::Resources((GROUP, "v1beta2"))),
            ("/healthz", Route::Open("healthz".to_owned(), false)),
            ("/livez?verbose", Route::Open("livez".to_owned(), true)),
            ("/readyz?verbose=true", Route::Open("readyz".to_owned(), true)),
            ("/openapi/v2", document("/openapi/v2")),
            ("/openapi/v3", document("/openapi/v3")),
            ("/openapi/v3/apis/custom.metrics.k8s.io/v1beta1?hash=0", document("/openapi/v3/apis/custom.metrics.k8s.io/v1beta1")),
            ("/version", Route::Open("version".to_owned(), false)),
        ];
        for (target, expected) in table {
            assert_eq!(route("GET", target, false, &[]), Ok(expected), "{target}");
        }
    }

    #[test]
    fn a_metric_is_named_by_namespace_resource_object_and_id() {
        let table = [
            ("services/kuard", &Resource::SERVICES, &Resource::SERVICES, "kuard"),
            ("services/deployment;kuard", &Resource::SERVICES, &Resource::DEPLOYMENTS, "kuard"),
            ("services/statefulset%3Bdb", &Resource::SERVICES, &Resource::STATEFUL_SETS, "db"),
            ("services/Deployment;kuard", &Resource::SERVICES, &Resource::DEPLOYMENTS, "kuard"),
            ("pods/kuard-1", &Resource::PODS, &Resource::PODS, "kuard-1"),
            ("deployments/kuard", &Resource::DEPLOYMENTS, &Resource::DEPLOYMENTS, "kuard"),
            ("deployments.apps/kuard", &Resource::DEPLOYMENTS, &Resource::DEPLOYMENTS, "kuard"),
            ("deployments.extensions/kuard", &Resource::OLD_DEPLOYMENTS, &Resource::DEPLOYMENTS, "kuard"),
            ("statefulsets.apps/db", &Resource::STATEFUL_SETS, &Resource::STATEFUL_SETS, "db"),
            ("daemonsets.apps/d", &Resource::DAEMON_SETS, &Resource::DAEMON_SETS, "d"),
            ("replicasets.apps/r", &Resource::REPLICA_SETS, &Resource::REPLICA_SETS, "r"),
            ("jobs.batch/j", &Resource::JOBS, &Resource::JOBS, "j"),
            ("jobs/j", &Resource::JOBS, &Resource::JOBS, "j"),
        ];
        for (middle, described, resource, object) in table {
            let target = format!("/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/{middle}/net.http.request.count");
            let read = read_of(&target).unwrap();
            assert_eq!(
                (read.described, read.select.resource, read.select.name.as_str()),
                (described, resource, object),
                "{target}"
            );
            assert_eq!(read.name, middle.split_once('/').unwrap().1.replace("%3B", ";"));
            assert_eq!((read.namespace.as_str(), read.metric.as_str()), ("default", "net.http.request.count"));
        }
        let read = read_of("/apis/custom.metrics.k8s.io/v1beta2/namespaces/shop/metrics/cpu.used.percent").unwrap();
        assert_eq!(
            (read.select.resource, read.select.name.as_str(), read.namespace.as_str()),
            (&Resource::NAMESPACES, "shop", "shop")
        );
    }

    #[test]
    fn what_the_api_server_authorizes_is_a_subresource_or_a_list() {
        let table = [
            ("namespaces/shop/services/deployment;kuard/m", "shop", ["services", "m", "deployment;kuard"], "get"),
            ("namespaces/shop/deployments/kuard/m", "shop", ["deployments.apps", "m", "kuard"], "get"),
            ("namespaces/shop/pods/%2A/m", "shop", ["pods", "m", "*"], "get"),
            ("namespaces/shop/metrics/m", "shop", ["metrics", "", "m"], "get"),
            ("namespaces/shop/m", "shop", ["m", "", ""], "list"),
            ("namespaces/*/m", "", ["m", "", ""], "list"),
            ("nodes/worker-1/m", "", ["nodes", "m", "worker-1"], "get"),
            ("nodes/*/m", "", ["nodes", "m", "*"], "get"),
        ];
        for (rest, namespace, access, verb) in table {
            let read = read_of(&format!("/apis/custom.metrics.k8s.io/v1beta2/{rest}")).unwrap();
            let [resource, subresource, name] = access;
            assert_eq!(read.namespace, namespace, "{rest}");
            assert_eq!(read.access, [verb, resource, subresource, name], "{rest}");
        }
    }

    #[test]
    fn selectors_are_those_of_the_objects_and_of_the_metric() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods";
        let read = read_of(&format!("{base}/%2A/m?labelSelector=app%3Dkuard%2Ctier+in+%28a%2Cb%29&metricLabelSelector=a%3Db"));
        let read = read.unwrap();
        assert_eq!(read.select.labels, "app=kuard,tier in (a,b)");
        assert_eq!(read.selector, [Requirement::is("a", ["b".to_owned()])]);
        let twice = read_of(&format!("{base}/kuard/m?metricLabelSelector=a=b&metricLabelSelector=a=c")).unwrap();
        assert_eq!(twice.selector.len(), 2, "what is asked for twice must hold twice");
    }

    #[test]
    fn encoding_hides_every_byte_that_could_mean_something() {
        for text in ["a b&c=d?e/f#g%h+i\"", "ä\u{0}\n", "kube_pod_name=~\"a|b\""] {
            let encoded = percent_encode(text);
            assert!(encoded.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%".contains(&b)), "{encoded}");
            assert_eq!(percent_decode(&encoded).as_deref(), Some(text));
        }
    }

    #[test]
    fn what_is_not_served_is_refused_with_its_name() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces";
        let table = [
            ("/nope".to_owned(), Reason::NotFound),
            ("/apis/nope.k8s.io".to_owned(), Reason::NotFound),
            ("/apis/custom.metrics.k8s.io/v9".to_owned(), Reason::NotFound),
            (format!("{base}/default"), Reason::NotFound),
            ("/apis/custom.metrics.k8s.io/v1beta2/pods/kuard/m".to_owned(), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard"), Reason::NotFound),
            (format!("{base}/default/widgets/kuard/m"), Reason::NotFound),
            (format!("{base}/default/services.apps/kuard/m"), Reason::NotFound),
            (format!("{base}/default/namespaces/default/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/m/more"), Reason::InvalidRequest),
            (format!("{base}/default/services/pod;kuard/m"), Reason::InvalidRequest),
            (format!("{base}/default/pods/deployment;kuard/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/deployment;/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/Kuard/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/a'b/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/a%22b"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/sum(up)"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/%00"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/%zz"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/%ff"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/%2"), Reason::InvalidRequest),
            (format!("{base}/default/services/ku%2Fard/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/../m"), Reason::InvalidRequest),
            (format!("{base}/default/services/%2e%2e/m"), Reason::InvalidRequest),
            (format!("{base}//services/kuard/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/m?watch=true"), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/m?a=%zz"), Reason::InvalidRequest),
            (format!("{base}/default/nodes/worker-1/m"), Reason::InvalidRequest),
            (format!("{base}/default/services/deployment;*/m"), Reason::InvalidRequest),
            (format!("{base}/default/pods/kuard/m?labelSelector=app%3Dkuard"), Reason::InvalidRequest),
            (format!("{base}/default/pods/kuard/m?metricLabelSelector=a%3Db%27"), Reason::InvalidRequest),
            (format!("{base}/{}/services/kuard/m", "n".repeat(64)), Reason::InvalidRequest),
            (format!("{base}/default/services/kuard/{}", "m".repeat(254)), Reason::InvalidRequest),
            (format!("/{}", "a".repeat(100_000)), Reason::InvalidRequest),
            ("//".to_owned(), Reason::InvalidRequest),
            ("nope".to_owned(), Reason::InvalidRequest),
            ("*".to_owned(), Reason::InvalidRequest),
        ];
        for (target, reason) in table {
            let error = route("GET", &target, true, &[]).expect_err(&target);
            assert_eq!(error.reason, reason, "{target}: {}", error.message);
            assert!(error.message.len() < 500, "{target}");
        }
    }

    #[test]
    fn only_get_is_allowed_and_unknown_paths_stay_unknown() {
        for method in ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "get"] {
            assert_eq!(route(method, "/apis", false, &[]).expect_err(method).reason, Reason::MethodNotAllowed);
            assert_eq!(route(method, "/nope", false, &[]).expect_err(method).reason, Reason::NotFound);
        }
    }

    #[test]
    fn parameters_without_meaning_here_do_no_harm() {
        let target = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/m";
        for query in ["pretty=true", "timeout=32s", "limit=500", "watch=false", "metricLabelSelector=", "labelSelector=", "&&"] {
            assert!(read_of(&format!("{target}?{query}")).is_ok(), "{query}");
        }
    }
}
