//! From a request line to a typed [`Route`]: pure, one match, nothing half understood.
//!
//! Paths are those of the custom metrics API,
//! <https://github.com/kubernetes/metrics/blob/master/pkg/apis/custom_metrics/v1beta2/types.go>,
//! and of a Kubernetes API server's discovery and health.

use crate::error::{Error, quoted, refusal};

/// The API group served.
pub const GROUP: &str = "custom.metrics.k8s.io";
const LONGEST_TARGET: usize = 8 * 1024;
pub(crate) const LONGEST_METRIC: usize = 253;
const WORKLOADS: &str = "deployment, statefulset, daemonset, replicaset or job";

/// Key of the metric selector that says how the values of an object's containers become one.
pub const AGGREGATION: &str = "sysdig/group-aggregation";
/// Without that selector: load per pod.
pub const AVERAGE: &str = "avg";

/// Its versions: what older autoscalers use, and what current ones prefer.
pub const VERSIONS: [&str; 2] = ["v1beta1", "v1beta2"];

/// A Kubernetes resource whose metrics can be read: what Kubernetes and Sysdig call it.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    /// `Deployment`
    pub kind: &'static str,
    /// `deployments`
    pub plural: &'static str,
    /// `apps`; empty for the core group.
    pub group: &'static str,
    /// `apps/v1`
    pub api_version: &'static str,
    /// Sysdig's label with an object's name; empty for namespaces, whose label every question has.
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
            /// All of them, those that autoscalers are pointed at most first.
            pub const ALL: [&'static Self; 8] = [$(&Self::$name),+];
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
    NAMESPACES: "Namespace" "namespaces" "" "v1" "" "" "";
}

/// The question of one metric of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The version to answer in.
    pub version: &'static str,
    /// The object's namespace; for a namespace its own name.
    pub namespace: String,
    /// The resource to name in the answer.
    pub described: &'static Resource,
    /// The name to give back, as asked: `kuard` or `deployment;kuard`.
    pub name: String,
    /// The resource that is measured: for `services/deployment;kuard` the Deployment.
    pub resource: &'static Resource,
    /// The measured object's name.
    pub object: String,
    /// The metric's id in Sysdig.
    pub metric: String,
    /// How the values of the object's containers become one, in Sysdig's words: `avg` or `sum`.
    pub aggregation: &'static str,
    /// The path asked for, without the query, for `selfLink`.
    pub path: String,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/apis`: the groups, plain or aggregated.
    Apis,
    /// `/apis/custom.metrics.k8s.io`
    Group,
    /// `healthz` and `livez`: the process works; `readyz`: it can be sent requests. True with `?verbose`.
    Health(&'static str, bool),
    /// `/openapi/v2`
    OpenApiV2,
    /// `/openapi/v3/apis/custom.metrics.k8s.io/VERSION`
    OpenApiV3(&'static str),
    /// `/openapi/v3`
    OpenApiV3Index,
    /// A metric.
    Read(Box<Read>),
    /// `/apis/custom.metrics.k8s.io/VERSION`
    Resources(&'static str),
    /// `/`
    Root,
    /// `/version`
    Version,
}

impl Resource {
    /// `pods`, `deployments.apps`
    pub fn qualified(&self) -> String {
        let dot = if self.group.is_empty() { "" } else { "." };
        format!("{}{dot}{}", self.plural, self.group)
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
        [] => Route::Root,
        ["apis"] => Route::Apis,
        ["apis", GROUP] => Route::Group,
        ["apis", GROUP, version] => Route::Resources(known_version(version, path)?),
        ["apis", GROUP, version, rest @ ..] => {
            Route::Read(Box::new(read(known_version(version, path)?, rest, &query, path)?))
        }
        ["healthz"] => Route::Health("healthz", verbose),
        ["livez"] => Route::Health("livez", verbose),
        ["readyz"] => Route::Health("readyz", verbose),
        ["openapi", "v2"] => Route::OpenApiV2,
        ["openapi", "v3"] => Route::OpenApiV3Index,
        ["openapi", "v3", "apis", GROUP, version] => Route::OpenApiV3(known_version(version, path)?),
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
        ["namespaces", namespace, "metrics", metric] => (*namespace, &Resource::NAMESPACES, *namespace, *metric),
        ["namespaces", namespace, resource, name, metric] => (*namespace, known_resource(resource)?, *name, *metric),
        ["namespaces"] | ["namespaces", _] | ["namespaces", _, _, _] => return Err(not_found(path)),
        _ => {
            return Err(refusal!(
                InvalidRequest,
                "a metric is read at namespaces/NAMESPACE/RESOURCE/NAME/METRIC or namespaces/NAMESPACE/metrics/METRIC"
            ));
        }
    };
    query.check_read(name)?;
    check_name("namespace", namespace, 63)?;
    if !is_metric_id(metric) {
        let what = quoted(metric);
        return Err(refusal!(InvalidRequest, "{what} is not a metric id: letters, digits, and _ . : - only"));
    }
    let (resource, object) = match name.split_once(';') {
        Some((workload, object)) if *described == Resource::SERVICES => {
            let what = quoted(workload);
            let mistake = || refusal!(InvalidRequest, "{what} is no workload type: TYPE;NAME takes {WORKLOADS}");
            (Resource::parse_workload(workload).ok_or_else(mistake)?, object)
        }
        _ => (described, name),
    };
    check_name("name", object, 253)?;
    Ok(Read {
        version,
        namespace: namespace.to_owned(),
        described,
        name: name.to_owned(),
        resource,
        object: object.to_owned(),
        metric: metric.to_owned(),
        aggregation: query.aggregation()?,
        path: path.to_owned(),
    })
}

fn known_version(text: &str, path: &str) -> Result<&'static str, Error> {
    VERSIONS.into_iter().find(|version| *version == text).ok_or_else(|| not_found(path))
}

fn known_resource(text: &str) -> Result<&'static Resource, Error> {
    match Resource::parse(text) {
        Some(resource) if *resource == Resource::NAMESPACES => {
            Err(refusal!(InvalidRequest, "metrics of a namespace are read at namespaces/NAMESPACE/metrics/METRIC"))
        }
        Some(resource) => Ok(resource),
        None => Err(refusal!(
            NotFound,
            "no metrics are served for resource {}: use pods, services, deployments.apps, statefulsets.apps, \
                 daemonsets.apps, replicasets.apps or jobs.batch",
            quoted(text)
        )),
    }
}

/// Kubernetes names hold lower-case letters, digits, `-` and `.`; nothing else can name an object,
/// and nothing else reaches a Sysdig filter.
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
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let path = path.strip_suffix('/').unwrap_or(path);
    path.split('/')
        .map(|segment| {
            let text = percent_decode(segment, false)
                .ok_or_else(|| refusal!(InvalidRequest, "{} is not valid percent-encoding", quoted(segment)))?;
            match text.as_str() {
                "" => Err(refusal!(InvalidRequest, "the path holds an empty segment")),
                "." | ".." => Err(refusal!(InvalidRequest, "the path holds . or .. segments")),
                _ if text.chars().any(|c| c == '/' || c.is_control()) => Err(refusal!(
                    InvalidRequest,
                    "the path holds a character that cannot be in a name: {}",
                    quoted(&text)
                )),
                _ => Ok(text),
            }
        })
        .collect()
}

/// Decodes `%2A`, and `+` as a blank where `form` says so. None if an escape is broken or the
/// result is not UTF-8.
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

/// The decoded parameters of a query, in order.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Result<Self, Error> {
        text.split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                match (percent_decode(key, true), percent_decode(value, true)) {
                    (Some(key), Some(value)) => Ok((key, value)),
                    _ => Err(refusal!(InvalidRequest, "{} in the query is not valid percent-encoding", quoted(pair))),
                }
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn has(&self, key: &str, fits: impl Fn(&str) -> bool) -> bool {
        self.0.iter().any(|(name, value)| name == key && fits(value.trim()))
    }

    /// What a read cannot honour is refused: an ignored selector would be another number than asked for.
    fn check_read(&self, name: &str) -> Result<(), Error> {
        if self.has("watch", |value| !matches!(value, "false" | "0")) {
            return Err(refusal!(InvalidRequest, "metrics cannot be watched"));
        }
        if name == "*" || self.has("labelSelector", |value| !value.is_empty()) {
            return Err(refusal!(
                InvalidRequest,
                "objects are read by name in this version: * and labelSelector (metrics of type Pods) are not served"
            ));
        }
        Ok(())
    }

    /// Sysdig's group aggregation, as a selector of the metric (`metric.selector` in the HPA) asks for it.
    fn aggregation(&self) -> Result<&'static str, Error> {
        let selectors = self.0.iter().filter(|(key, value)| key == "metricLabelSelector" && !value.trim().is_empty());
        let mut asked = selectors.map(|(_, value)| value.trim().strip_prefix(AGGREGATION));
        match (asked.next(), asked.next()) {
            (None | Some(Some("=avg")), None) => Ok(AVERAGE),
            (Some(Some("=sum")), None) => Ok("sum"),
            _ => Err(refusal!(
                InvalidRequest,
                "metricLabelSelector (metric.selector in the HPA) can only be {AGGREGATION}=sum or =avg in this version"
            )),
        }
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
        let table = [
            ("/", Route::Root),
            ("/apis", Route::Apis),
            ("/apis/", Route::Apis),
            ("/apis/custom.metrics.k8s.io", Route::Group),
            ("/apis/custom.metrics.k8s.io/v1beta1", Route::Resources("v1beta1")),
            ("/apis/custom.metrics.k8s.io/v1beta2/", Route::Resources("v1beta2")),
            ("/healthz", Route::Health("healthz", false)),
            ("/livez?verbose", Route::Health("livez", true)),
            ("/readyz?verbose=true", Route::Health("readyz", true)),
            ("/openapi/v2", Route::OpenApiV2),
            ("/openapi/v3", Route::OpenApiV3Index),
            ("/openapi/v3/apis/custom.metrics.k8s.io/v1beta1?hash=0", Route::OpenApiV3("v1beta1")),
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
    fn a_selector_of_the_metric_says_how_pods_become_one_value_and_nothing_else() {
        let read = |selectors: &str| {
            let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/services/kuard/m";
            read_of(&format!("{base}?{selectors}")).map(|read| read.aggregation).map_err(|error| error.reason)
        };
        let table = [
            ("", Ok("avg")),
            ("metricLabelSelector=", Ok("avg")),
            ("metricLabelSelector=sysdig%2Fgroup-aggregation%3Davg", Ok("avg")),
            ("metricLabelSelector=sysdig%2Fgroup-aggregation%3Dsum", Ok("sum")),
            ("metricLabelSelector=sysdig/group-aggregation=sum&metricLabelSelector=", Ok("sum")),
        ];
        for (selectors, expected) in table {
            assert_eq!(read(selectors), expected, "{selectors}");
        }
        for selector in [
            "sysdig/group-aggregation=max",
            "sysdig/group-aggregation=",
            "sysdig/group-aggregation",
            "!sysdig/group-aggregation",
            "sysdig/group-aggregation!=sum",
            "sysdig/group-aggregation=sum,a=b",
            "a=b,sysdig/group-aggregation=sum",
            "sysdig/group-aggregation=SUM",
            "sysdig/group-aggregation=sum%27",
            "sysdig/group-aggregation=sum&metricLabelSelector=sysdig/group-aggregation=avg",
        ] {
            assert_eq!(read(&format!("metricLabelSelector={selector}")), Err(Reason::InvalidRequest), "{selector}");
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
            (format!("{base}/default/services"), Reason::InvalidRequest),
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
            (format!("{base}/default/pods/%2A/m?labelSelector=app%3Dkuard"), Reason::InvalidRequest),
            (format!("{base}/default/pods/kuard/m?labelSelector=app%3Dkuard"), Reason::InvalidRequest),
            (format!("{base}/default/pods/kuard/m?metricLabelSelector=a%3Db"), Reason::InvalidRequest),
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
