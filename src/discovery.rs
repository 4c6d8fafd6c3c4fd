//! Discovery: which group, versions and metrics there are.
//!
//! Made from memory alone, bounded and never empty, because a client that gets no valid document here
//! (kubectl, the namespace controller) fails for every resource of the cluster, not only for metrics.
//! Sources: <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#discovery-api> and
//! <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/3352-aggregated-discovery>.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::route::{GROUP, Resource};

/// Largest resource list. The aggregator fetches five copies in parallel every 30 seconds, per version.
const MAX_BODY: usize = 256 * 1024;
/// Longest metric name listed, the longest that can be read.
const MAX_NAME: usize = 253;
/// Listed when a metric per resource does not fit: what autoscalers are pointed at most.
const CROWDED: [&Resource; 2] = [&Resource::SERVICES, &Resource::PODS];
/// Ids of Sysdig's own metrics. They stand in for the list until it is known, and stay when it must be cut.
/// Source: <https://docs.sysdig.com/en/docs/sysdig-monitor/using-monitor/metrics/metrics-library/sysdig-legacy-format/>.
const WELL_KNOWN: &str = "container.count cpu.cores.used cpu.quota.used.percent cpu.used.percent file.bytes.total \
    file.error.total.count file.iops.total fs.used.percent memory.bytes.used memory.limit.used.percent \
    memory.used.percent net.bytes.total net.error.count net.http.error.count net.http.request.count \
    net.http.request.time net.request.count net.request.time";

/// What is served, for `/`.
pub const ROOT: &str = r#"{"paths":["/apis","/apis/custom.metrics.k8s.io","/apis/custom.metrics.k8s.io/v1beta1","/apis/custom.metrics.k8s.io/v1beta2","/healthz","/livez","/openapi/v2","/openapi/v3","/readyz","/version"]}"#;

macro_rules! group {
    () => {
        r#""name":"custom.metrics.k8s.io","versions":[{"groupVersion":"custom.metrics.k8s.io/v1beta2","version":"v1beta2"},{"groupVersion":"custom.metrics.k8s.io/v1beta1","version":"v1beta1"}],"preferredVersion":{"groupVersion":"custom.metrics.k8s.io/v1beta2","version":"v1beta2"}}"#
    };
}

/// The APIGroup, for `/apis/custom.metrics.k8s.io`.
/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIGroup>.
pub const API_GROUP: &str = concat!(r#"{"kind":"APIGroup","apiVersion":"v1","#, group!());

/// The APIGroupList, for `/apis`.
/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIGroupList>.
pub const API_GROUP_LIST: &str = concat!(r#"{"kind":"APIGroupList","apiVersion":"v1","groups":[{"#, group!(), "]}");

/// The APIGroupDiscoveryList of version `v2` or `v2beta1`, for `/apis` to those who ask for it.
///
/// It lists no resources, so that its size does not depend on the number of metrics: kubectl, the
/// HorizontalPodAutoscaler and the namespace controller need the group and its versions only.
/// Source: <https://pkg.go.dev/k8s.io/api/apidiscovery/v2#APIGroupDiscoveryList>.
pub fn api_group_discovery_list(version: &str) -> String {
    let versions = r#"[{"version":"v1beta2","resources":[],"freshness":"Current"},{"version":"v1beta1","resources":[],"freshness":"Current"}]"#;
    format!(
        r#"{{"kind":"APIGroupDiscoveryList","apiVersion":"apidiscovery.k8s.io/{version}","metadata":{{}},"items":[{{"metadata":{{"name":"{GROUP}"}},"versions":{versions}}}]}}"#
    )
}

/// The APIResourceList of a version, for `/apis/custom.metrics.k8s.io/VERSION`: `services/net.http.request.count`.
///
/// At most 256 KiB: if all metrics of all resources are more, then of services and pods only, and of those the
/// well-known ones first. What is left out can be read all the same. Names that cannot stand in a path are skipped.
/// The cost grows with `metrics`, so this is for when they change, not for every request.
/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIResourceList>.
pub fn api_resource_list(version: &str, metrics: &[String]) -> String {
    let well_known = || WELL_KNOWN.split(' ').map(|name| (false, name));
    let known = metrics.iter().map(String::as_str).filter(|name| is_listable(name));
    let mut names: BTreeSet<_> = known.map(|name| (well_known().all(|(_, known)| known != name), name)).collect();
    if names.is_empty() {
        names = well_known().collect();
    }
    let list = |resources: &[Value]| {
        let version = format!("{GROUP}/{version}");
        json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources })
    };
    let room = MAX_BODY.saturating_sub(size(&list(&[])));
    let letters: usize = names.iter().map(|(_, name)| name.len()).sum();
    let all: usize =
        Resource::ALL.map(|resource| names.len() * (size(&entry(resource, "")) + 1) + letters).iter().sum();
    let resources = if all <= room { Resource::ALL.as_slice() } else { CROWDED.as_slice() };
    let mut used = 0;
    let entries: Vec<Value> = names
        .iter()
        .flat_map(|(_, name)| resources.iter().map(move |resource| entry(resource, name)))
        .take_while(|entry| {
            used += size(entry) + 1;
            used <= room
        })
        .collect();
    list(&entries).to_string()
}

fn entry(resource: &Resource, metric: &str) -> Value {
    json!({
        "name": format!("{}/{metric}", resource.qualified()),
        "singularName": "",
        "namespaced": *resource != Resource::NAMESPACES,
        "kind": "MetricValueList",
        "verbs": ["get"],
    })
}

fn size(value: &Value) -> usize {
    value.to_string().len()
}

fn is_listable(metric: &str) -> bool {
    metric.len() <= MAX_NAME
        && metric.bytes().any(|b| b.is_ascii_alphanumeric())
        && metric.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(document: &str) -> Value {
        serde_json::from_str(document).unwrap()
    }

    fn names(document: &str) -> Vec<String> {
        let list = parsed(document);
        list["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_root_lists_what_is_served() {
        let expected = json!({ "paths": [
            "/apis", "/apis/custom.metrics.k8s.io", "/apis/custom.metrics.k8s.io/v1beta1",
            "/apis/custom.metrics.k8s.io/v1beta2", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz",
            "/version",
        ] });
        assert_eq!(parsed(ROOT), expected);
    }

    #[test]
    fn the_group_is_the_same_alone_and_in_the_list() {
        let (newer, older) = (
            json!({ "groupVersion": "custom.metrics.k8s.io/v1beta2", "version": "v1beta2" }),
            json!({ "groupVersion": "custom.metrics.k8s.io/v1beta1", "version": "v1beta1" }),
        );
        let fields = json!({ "name": GROUP, "versions": [newer, older], "preferredVersion": newer });
        assert_eq!(parsed(API_GROUP_LIST), json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [fields] }));
        let mut expected = fields;
        expected["kind"] = json!("APIGroup");
        expected["apiVersion"] = json!("v1");
        assert_eq!(parsed(API_GROUP), expected);
    }

    #[test]
    fn the_aggregated_document_names_its_version_and_no_resources() {
        for version in ["v2", "v2beta1"] {
            let document = api_group_discovery_list(version);
            let expected = json!({
                "kind": "APIGroupDiscoveryList",
                "apiVersion": format!("apidiscovery.k8s.io/{version}"),
                "metadata": {},
                "items": [{ "metadata": { "name": GROUP }, "versions": [
                    { "version": "v1beta2", "resources": [], "freshness": "Current" },
                    { "version": "v1beta1", "resources": [], "freshness": "Current" },
                ] }],
            });
            assert_eq!(parsed(&document), expected);
        }
    }

    #[test]
    fn a_metric_is_listed_once_for_every_resource() {
        let metrics = ["my.metric:a-b_c", "my.metric:a-b_c"].map(str::to_owned);
        let document = api_resource_list("v1beta1", &metrics);
        assert_eq!(
            names(&document),
            [
                "daemonsets.apps",
                "deployments.apps",
                "jobs.batch",
                "namespaces",
                "pods",
                "replicasets.apps",
                "services",
                "statefulsets.apps"
            ]
            .map(|resource| format!("{resource}/my.metric:a-b_c")),
        );
        let list = parsed(&document);
        assert_eq!(list["kind"], "APIResourceList");
        assert_eq!(list["groupVersion"], "custom.metrics.k8s.io/v1beta1");
        for resource in list["resources"].as_array().unwrap() {
            let name = resource["name"].as_str().unwrap();
            let expected = json!({
                "name": name,
                "singularName": "",
                "namespaced": !name.starts_with("namespaces/"),
                "kind": "MetricValueList",
                "verbs": ["get"],
            });
            assert_eq!(*resource, expected);
        }
    }

    #[test]
    fn without_a_listable_name_the_well_known_ones_are_listed() {
        let bad =
            ["", "a/b", "a b", "a\"b", "ä", "a\n", "a%2Fb", "..", ".", &"a".repeat(MAX_NAME + 1)].map(str::to_owned);
        for metrics in [&[][..], &bad] {
            let names = names(&api_resource_list("v1beta2", metrics));
            assert_eq!(names.len(), 18 * Resource::ALL.len());
            assert!(names.contains(&"services/net.http.request.count".to_owned()), "{names:?}");
        }
        let mixed: Vec<String> = bad.into_iter().chain(["ok".to_owned()]).collect();
        assert!(names(&api_resource_list("v1beta2", &mixed)).iter().all(|name| name.ends_with("/ok")));
        assert!(WELL_KNOWN.split(' ').all(is_listable));
    }

    #[test]
    fn the_list_is_valid_and_bounded_whatever_the_number_of_metrics() {
        let metrics: Vec<String> = (0..20_000)
            .map(|n| format!("a.custom.metric.{n:05}"))
            .chain(["net.http.request.count".to_owned()])
            .collect();
        let entry_len = size(&entry(&Resource::SERVICES, "a.custom.metric.00000")) + 1;
        let mut last = 0;
        for count in (0..400).step_by(31).chain([999, 20_000]) {
            let body = api_resource_list("v1beta2", &metrics[20_000 - count..]);
            let listed = names(&body);
            assert!(body.len() <= MAX_BODY, "{count}: {}", body.len());
            assert!(listed.contains(&"services/net.http.request.count".to_owned()), "{count}");
            let whole = listed.len() == 8 * (count + 1) || listed.len() == 2 * (count + 1);
            assert!(whole || body.len() + entry_len > MAX_BODY, "{count}: {} entries", listed.len());
            last = body.len();
        }
        assert!(last > MAX_BODY - entry_len);
        let longest: Vec<String> = (0..800).map(|n| format!("{n:0>MAX_NAME$}")).collect();
        let body = api_resource_list("v1beta2", &longest);
        assert!(body.len() <= MAX_BODY && body.len() > MAX_BODY - 1000);
    }
}
