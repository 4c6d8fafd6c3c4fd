//! From a request line to a typed [`Route`]: pure, one match, nothing half understood.
//! Source: <https://github.com/kubernetes/metrics/blob/master/pkg/apis/custom_metrics/v1beta2/types.go>.

use crate::discovery;
use crate::error::{Error, quoted, refusal};
use crate::selector::{self, Requirement, Tuning};

/// The API group of metrics that describe objects.
pub const GROUP: &str = "custom.metrics.k8s.io";
const LONGEST_TARGET: usize = 8 * 1024;
pub(crate) const LONGEST_METRIC: usize = 253;

/// Its versions: what current autoscalers prefer, and what older ones use.
pub const VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];

/// A Kubernetes resource whose metrics can be read: what Kubernetes and Sysdig call it.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    pub kind: &'static str,
    pub plural: &'static str,
    /// `apps`; empty for the core group.
    pub group: &'static str,
    pub api_version: &'static str,
    /// Sysdig's label with an object's name.
    pub label: &'static str,
    /// Sysdig's workload type; empty for what is no workload.
    pub workload_type: &'static str,
    /// JSON pointer to the number of Ready pods, where the object tells it.
    pub ready: &'static str,
}

macro_rules! resources {
    ($($name:ident: $kind:literal $plural:literal $group:literal $version:literal $label:literal $type:literal $ready:literal;)+) => {
        impl Resource {
            $(#[doc = concat!("`", $plural, "`")]
            pub const $name: Self =
                Self { kind: $kind, plural: $plural, group: $group, api_version: $version, label: $label, workload_type: $type, ready: $ready };)+
            /// Those that autoscalers are pointed at most first.
            pub const ALL: [&'static Self; 9] = [$(&Self::$name),+];
        }
    };
}

resources! {
    SERVICES: "Service" "services" "" "v1" "kubernetes.service.name" "" "";
    PODS: "Pod" "pods" "" "v1" "kubernetes.pod.name" "" "";
    DEPLOYMENTS: "Deployment" "deployments" "apps" "apps/v1" "kubernetes.deployment.name" "deployment" "/status/readyReplicas";
    STATEFUL_SETS: "StatefulSet" "statefulsets" "apps" "apps/v1" "kubernetes.statefulSet.name" "statefulset" "/status/readyReplicas";
    DAEMON_SETS: "DaemonSet" "daemonsets" "apps" "apps/v1" "kubernetes.daemonSet.name" "daemonset" "/status/numberReady";
    REPLICA_SETS: "ReplicaSet" "replicasets" "apps" "apps/v1" "kubernetes.replicaSet.name" "replicaset" "/status/readyReplicas";
    JOBS: "Job" "jobs" "batch" "batch/v1" "kubernetes.job.name" "job" "/status/ready";
    NODES: "Node" "nodes" "" "v1" "kubernetes.node.name" "" "";
    NAMESPACES: "Namespace" "namespaces" "" "v1" "kubernetes.namespace.name" "" "";
}

/// The question of one metric of one object, or of all that a selector names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    pub version: &'static str,
    /// The object's namespace; for a namespace its own name, empty for nodes.
    pub namespace: String,
    pub described: &'static Resource,
    /// The name as asked: `kuard`, `deployment;kuard`, or `*` for all.
    pub name: String,
    /// The resource that is measured: for `services/deployment;kuard` the Deployment.
    pub resource: &'static Resource,
    /// The measured object's name, or `*`.
    pub object: String,
    /// With `*`: the labels that the objects must have, as asked.
    pub objects: String,
    pub metric: String,
    /// The selector of the metric as asked, and the labels that its samples must have.
    pub selector: String,
    pub labels: Vec<Requirement>,
    pub tuning: Tuning,
    /// Resource, subresource and name as the API server authorizes them: a metric is a subresource of its object.
    pub access: [String; 3],
    /// The path asked for, without the query, for `selfLink`.
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/apis`: the groups, plain or aggregated.
    Apis,
    /// What nobody needs to be asked for.
    Document(String),
    /// `healthz` and `livez`: the process works; `readyz`: it can be sent requests. True with `?verbose`.
    Health(&'static str, bool),
    Read(Box<Read>),
    /// `/apis/custom.metrics.k8s.io/VERSION`
    Resources(&'static str),
    Version,
}

impl Read {
    /// For the authorizer: `get`, or `list` without a name.
    pub fn verb(&self) -> &'static str {
        let [_, _, name] = &self.access;
        if name.is_empty() { "list" } else { "get" }
    }
}

impl Resource {
    /// `pods`, `deployments.apps`
    pub fn qualified(&self) -> String {
        let dot = if self.group.is_empty() { "" } else { "." };
        format!("{}{dot}{}", self.plural, self.group)
    }

    /// Whether objects of this resource lie in namespaces.
    pub fn is_namespaced(&self) -> bool {
        *self != Self::NODES && *self != Self::NAMESPACES
    }

    /// `pods`, `deployments` or `deployments.apps`; old groups of the same objects count as the same.
    fn parse(text: &str) -> Option<&'static Self> {
        let (plural, group) = text.split_once('.').unwrap_or((text, ""));
        let found = Self::ALL.into_iter().find(|resource| resource.plural == plural)?;
        let known = text == plural
            || (!group.is_empty() && (group == found.group || (group, found.group) == ("extensions", "apps")));
        known.then_some(found)
    }

    /// The workload types of the old adapter's `services/TYPE;NAME`, in any case.
    fn parse_workload(text: &str) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|resource| !text.is_empty() && resource.workload_type.eq_ignore_ascii_case(text))
    }
}

/// Understands a request line. Errors name what is wrong and what is served.
pub fn route(method: &str, target: &str) -> Result<Route, Error> {
    if target.len() > LONGEST_TARGET {
        return Err(refusal!(InvalidRequest, "the path and query are longer than {LONGEST_TARGET} bytes"));
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let segments = segments(path)?;
    let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
    let query = Query::parse(query)?;
    let verbose = query.has("verbose", |_| true);
    let route = match parts.as_slice() {
        [] => Route::Document(discovery::ROOT.to_owned()),
        ["apis"] => Route::Apis,
        ["apis", GROUP] => Route::Document(discovery::api_group()),
        ["apis", GROUP, version] => Route::Resources(known_version(version, path)?),
        ["apis", GROUP, version, rest @ ..] => {
            Route::Read(Box::new(read(known_version(version, path)?, rest, &query, path)?))
        }
        ["healthz"] => Route::Health("healthz", verbose),
        ["livez"] => Route::Health("livez", verbose),
        ["readyz"] => Route::Health("readyz", verbose),
        ["openapi", "v2"] => Route::Document(discovery::OPENAPI_V2.to_owned()),
        ["openapi", "v3"] => Route::Document(discovery::openapi_v3_index().to_string()),
        ["openapi", "v3", "apis", GROUP, version] => {
            Route::Document(discovery::openapi_v3(known_version(version, path)?).to_owned())
        }
        ["version"] => Route::Version,
        _ => return Err(not_found(path)),
    };
    if method != "GET" {
        return Err(refusal!(MethodNotAllowed, "{} is not allowed: metrics are read-only, use GET", quoted(method)));
    }
    Ok(route)
}

fn read(version: &'static str, rest: &[&str], query: &Query, path: &str) -> Result<Read, Error> {
    let (namespace, described, name, metric) = match rest {
        ["namespaces", name, "metrics", metric] | ["namespaces", name, metric] => {
            (*name, &Resource::NAMESPACES, *name, *metric)
        }
        ["namespaces", namespace, resource, name, metric] => (*namespace, namespaced(resource)?, *name, *metric),
        ["nodes", name, metric] => ("", &Resource::NODES, *name, *metric),
        ["namespaces"] | ["namespaces", _] | ["namespaces", _, _, _] => return Err(not_found(path)),
        _ => {
            let places =
                "namespaces/NAMESPACE/RESOURCE/NAME/METRIC, namespaces/NAME/metrics/METRIC or nodes/NAME/METRIC";
            return Err(refusal!(InvalidRequest, "a metric is read at {places}"));
        }
    };
    if query.has("watch", |value| !matches!(value, "false" | "0")) {
        return Err(refusal!(InvalidRequest, "metrics cannot be watched"));
    }
    if !is_metric_id(metric) {
        return Err(refusal!(InvalidRequest, "{} is not a metric id: letters, digits, _ . : - only", quoted(metric)));
    }
    let (resource, object) = match name.split_once(';') {
        Some((workload, object)) if *described == Resource::SERVICES => {
            let types = "deployment, statefulset, daemonset, replicaset or job";
            let what = quoted(workload);
            let mistake = || refusal!(InvalidRequest, "{what} is no workload type: TYPE;NAME takes {types}");
            (Resource::parse_workload(workload).ok_or_else(mistake)?, object)
        }
        _ => (described, name),
    };
    let qualified = described.qualified();
    let access = match rest {
        [_, _, "metrics", _] => ["metrics", "", metric],
        ["namespaces", _, _] => [metric, "", ""],
        _ => [qualified.as_str(), metric, name],
    };
    let all = name == "*";
    let namespace = if all && *described == Resource::NAMESPACES { "" } else { namespace };
    if !namespace.is_empty() {
        check_name("namespace", namespace, 63)?;
    }
    if !all {
        check_name("name", object, 253)?;
    }
    let objects = query.selector("labelSelector");
    if !all && !objects.is_empty() {
        return Err(refusal!(InvalidRequest, "labelSelector selects objects, so it takes * in place of {name}"));
    }
    let selector = query.selector("metricLabelSelector");
    let (labels, tuning) = selector::parse(&selector)?;
    Ok(Read {
        version,
        namespace: namespace.to_owned(),
        described,
        name: name.to_owned(),
        resource,
        object: object.to_owned(),
        objects,
        metric: metric.to_owned(),
        selector,
        labels,
        tuning,
        access: access.map(str::to_owned),
        path: path.to_owned(),
    })
}

fn known_version(text: &str, path: &str) -> Result<&'static str, Error> {
    VERSIONS.into_iter().find(|version| *version == text).ok_or_else(|| not_found(path))
}

fn namespaced(text: &str) -> Result<&'static Resource, Error> {
    match Resource::parse(text) {
        Some(resource) if resource.is_namespaced() => Ok(resource),
        Some(Resource { plural, .. }) => Err(refusal!(InvalidRequest, "{plural} are read at {plural}/NAME/METRIC")),
        None => Err(refusal!(
            NotFound,
            "no metrics are served for resource {}: use pods, services, deployments.apps, statefulsets.apps, \
                 daemonsets.apps, replicasets.apps, jobs.batch, namespaces or nodes",
            quoted(text)
        )),
    }
}

/// Nothing but lower-case letters, digits, `-` and `.` can name an object, and nothing else reaches a query.
fn check_name(what: &str, text: &str, longest: usize) -> Result<(), Error> {
    let fits = !text.is_empty()
        && text.len() <= longest
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
    if fits { Ok(()) } else { Err(refusal!(InvalidRequest, "{} is not a Kubernetes {what}", quoted(text))) }
}

/// Whether a metric of this name can be asked for.
pub fn is_metric_id(text: &str) -> bool {
    text.len() <= LONGEST_METRIC
        && text.contains(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
}

fn not_found(path: &str) -> Error {
    refusal!(NotFound, "nothing is served at {}; / lists what is", quoted(path))
}

/// The decoded segments of a path. One trailing slash is no segment.
fn segments(path: &str) -> Result<Vec<String>, Error> {
    let path = path.strip_prefix('/').ok_or_else(|| refusal!(InvalidRequest, "the path does not start with /"))?;
    let parts = path.strip_suffix('/').unwrap_or(path).split('/').filter(|_| !path.is_empty());
    let decoded = parts.map(|segment| {
        let text = percent_decode(segment, false)
            .ok_or_else(|| refusal!(InvalidRequest, "{} is not valid percent-encoding", quoted(segment)))?;
        let mistake = match text.as_str() {
            "" => "an empty segment",
            "." | ".." => ". or .. segments",
            _ if text.chars().any(|c| c == '/' || c.is_control()) => "a character that cannot be in a name",
            _ => return Ok(text),
        };
        Err(refusal!(InvalidRequest, "the path holds {mistake}: {}", quoted(&text)))
    });
    decoded.collect()
}

/// Decodes `%2A`, and `+` as a blank where `form` says so. None if it is broken or not UTF-8.
pub fn percent_decode(text: &str, form: bool) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if form => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}

/// Encodes what could mean something in a query.
pub fn percent_encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Result<Self, Error> {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decoded = percent_decode(key, true).zip(percent_decode(value, true));
            decoded
                .ok_or_else(|| refusal!(InvalidRequest, "{} in the query is not valid percent-encoding", quoted(pair)))
        });
        pairs.collect::<Result<_, _>>().map(Self)
    }

    fn has(&self, key: &str, fits: impl Fn(&str) -> bool) -> bool {
        self.0.iter().any(|(name, value)| name == key && fits(value.trim()))
    }

    /// A selector given twice must hold twice.
    fn selector(&self, key: &str) -> String {
        let given = self.0.iter().filter(|(name, value)| name == key && !value.trim().is_empty());
        given.map(|(_, value)| value.trim()).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    fn read_of(target: &str) -> Result<Read, Error> {
        match route("GET", target)? {
            Route::Read(read) => Ok(*read),
            other => panic!("{target} is {other:?}"),
        }
    }

    #[test]
    fn documents_have_their_paths() {
        let document = |text: &str| Route::Document(text.to_owned());
        let table = [
            ("/", document(discovery::ROOT)),
            ("/apis", Route::Apis),
            ("/apis/", Route::Apis),
            ("/apis/custom.metrics.k8s.io", document(&discovery::api_group())),
            ("/apis/custom.metrics.k8s.io/v1beta1", Route::Resources("v1beta1")),
            ("/apis/custom.metrics.k8s.io/v1beta2/", Route::Resources("v1beta2")),
            ("/healthz", Route::Health("healthz", false)),
            ("/livez?verbose", Route::Health("livez", true)),
            ("/readyz?verbose=true", Route::Health("readyz", true)),
            ("/openapi/v2", document(discovery::OPENAPI_V2)),
            ("/openapi/v3", document(&discovery::openapi_v3_index().to_string())),
            ("/openapi/v3/apis/custom.metrics.k8s.io/v1beta1?hash=0", document(discovery::openapi_v3("v1beta1"))),
            ("/version", Route::Version),
        ];
        for (target, expected) in table {
            assert_eq!(route("GET", target), Ok(expected), "{target}");
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
            ("deployments.extensions/kuard", &Resource::DEPLOYMENTS, &Resource::DEPLOYMENTS, "kuard"),
            ("statefulsets.apps/db", &Resource::STATEFUL_SETS, &Resource::STATEFUL_SETS, "db"),
            ("daemonsets.apps/d", &Resource::DAEMON_SETS, &Resource::DAEMON_SETS, "d"),
            ("replicasets.apps/r", &Resource::REPLICA_SETS, &Resource::REPLICA_SETS, "r"),
            ("jobs.batch/j", &Resource::JOBS, &Resource::JOBS, "j"),
            ("jobs/j", &Resource::JOBS, &Resource::JOBS, "j"),
        ];
        for (middle, described, resource, object) in table {
            let target =
                format!("/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/{middle}/net.http.request.count");
            let read = read_of(&target).unwrap();
            assert_eq!(
                (read.described, read.resource, read.object.as_str()),
                (described, resource, object),
                "{target}"
            );
            assert_eq!(read.name, middle.split_once('/').unwrap().1.replace("%3B", ";"));
            assert_eq!((read.namespace.as_str(), read.metric.as_str()), ("default", "net.http.request.count"));
            assert_eq!(read.path, target);
        }
        let read = read_of("/apis/custom.metrics.k8s.io/v1beta2/namespaces/shop/metrics/cpu.used.percent").unwrap();
        assert_eq!(
            (read.resource, read.object.as_str(), read.namespace.as_str()),
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
            assert_eq!((read.namespace.as_str(), read.verb()), (namespace, verb), "{rest}");
            assert_eq!(read.access, access.map(str::to_owned), "{rest}");
        }
    }

    #[test]
    fn selectors_are_those_of_the_objects_and_of_the_metric() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods";
        let read =
            read_of(&format!("{base}/%2A/m?labelSelector=app%3Dkuard%2Ctier+in+%28a%2Cb%29&metricLabelSelector=a%3Db"));
        let read = read.unwrap();
        assert_eq!((read.objects.as_str(), read.selector.as_str()), ("app=kuard,tier in (a,b)", "a=b"));
        assert_eq!(read.labels, [Requirement { key: "a".to_owned(), values: vec!["b".to_owned()] }]);
        let twice = read_of(&format!("{base}/kuard/m?metricLabelSelector=a=b&metricLabelSelector=a=c")).unwrap();
        assert_eq!(twice.labels.len(), 2, "what is asked for twice must hold twice");
    }

    #[test]
    fn encoding_hides_every_byte_that_could_mean_something() {
        for text in ["a b&c=d?e/f#g%h+i\"", "ä\u{0}\n", "kube_pod_name=~\"a|b\""] {
            let encoded = percent_encode(text);
            assert!(encoded.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%".contains(&b)), "{encoded}");
            assert_eq!(percent_decode(&encoded, true).as_deref(), Some(text));
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
            let error = route("GET", &target).expect_err(&target);
            assert_eq!(error.reason, reason, "{target}: {}", error.message);
            assert!(error.message.len() < 500, "{target}");
        }
    }

    #[test]
    fn only_get_is_allowed_and_unknown_paths_stay_unknown() {
        for method in ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "get"] {
            assert_eq!(route(method, "/apis").expect_err(method).reason, Reason::MethodNotAllowed);
            assert_eq!(route(method, "/nope").expect_err(method).reason, Reason::NotFound);
        }
    }

    #[test]
    fn parameters_without_meaning_here_do_no_harm() {
        let target = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/m";
        for query in
            ["pretty=true", "timeout=32s", "limit=500", "watch=false", "metricLabelSelector=", "labelSelector=", "&&"]
        {
            assert!(read_of(&format!("{target}?{query}")).is_ok(), "{query}");
        }
    }
}
