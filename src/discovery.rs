//! Discovery: which group, versions and metrics there are, their OpenAPI, and the form a client accepts.
//! From memory alone and never empty: a client that gets no valid document here fails for every resource there is.
//! Sources: <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#discovery-api> and
//! <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/3352-aggregated-discovery>.

use crate::promql;
use crate::route::{GROUP, Resource, VERSIONS, is_metric_id};
use serde_json::{Value, json};
use std::{collections::BTreeMap, collections::BTreeSet, hash::DefaultHasher, hash::Hasher};

/// Largest resource list. The aggregator fetches five copies in parallel every 30 seconds, per version.
const MAX_BODY: usize = 256 * 1024;
pub(crate) const ROOT: &str = r#"{"paths":["/apis","/apis/custom.metrics.k8s.io","/apis/custom.metrics.k8s.io/v1beta1","/apis/custom.metrics.k8s.io/v1beta2","/healthz","/livez","/openapi/v2","/openapi/v3","/readyz","/version"]}"#;

const API_GROUP: &str = r#""name":"custom.metrics.k8s.io","versions":[{"groupVersion":"custom.metrics.k8s.io/v1beta2","version":"v1beta2"},{"groupVersion":"custom.metrics.k8s.io/v1beta1","version":"v1beta1"}],"preferredVersion":{"groupVersion":"custom.metrics.k8s.io/v1beta2","version":"v1beta2"}}"#;

/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIGroup>.
pub(crate) fn api_group() -> String {
    format!(r#"{{"kind":"APIGroup","apiVersion":"v1",{API_GROUP}"#)
}

/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIGroupList>.
pub(crate) fn api_group_list() -> String {
    format!(r#"{{"kind":"APIGroupList","apiVersion":"v1","groups":[{{{API_GROUP}]}}"#)
}

/// The APIGroupDiscoveryList of version `v2` or `v2beta1`, for `/apis` to those who ask for it.
/// It lists no resources, so that its size does not depend on the metrics; clients need the versions only.
/// Source: <https://pkg.go.dev/k8s.io/api/apidiscovery/v2#APIGroupDiscoveryList>.
pub(crate) fn api_group_discovery_list(version: &str) -> String {
    let versions = r#"[{"version":"v1beta2","resources":[],"freshness":"Current"},{"version":"v1beta1","resources":[],"freshness":"Current"}]"#;
    format!(
        r#"{{"kind":"APIGroupDiscoveryList","apiVersion":"apidiscovery.k8s.io/{version}","metadata":{{}},"items":[{{"metadata":{{"name":"{GROUP}"}},"versions":{versions}}}]}}"#
    )
}

/// The APIResourceList of a version, for `/apis/GROUP/VERSION`: `services/net.http.request.count`.
/// At most 256 KiB: services first, and of their metrics the well-known ones. What is left out can be read all the
/// same. Names that cannot stand in a path are skipped.
/// The cost grows with `metrics`, so this is for when they change, not for every request.
/// Source: <https://pkg.go.dev/k8s.io/apimachinery/pkg/apis/meta/v1#APIResourceList>.
pub(crate) fn api_resource_list(version: &str, metrics: &[String]) -> String {
    let well_known = || promql::OWN.lines().filter_map(|line| Some((false, line.split(' ').next()?)));
    let known = metrics.iter().map(String::as_str).filter(|name| is_metric_id(name));
    let mut names: BTreeSet<_> = known.map(|name| (well_known().all(|(_, known)| known != name), name)).collect();
    if names.is_empty() {
        names = well_known().collect();
    }
    let start =
        format!(r#"{{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"{GROUP}/{version}","resources":["#);
    let all = Resource::ALL.iter().flat_map(|resource| names.iter().map(|(_, name)| entry(resource, name)));
    let mut length = start.len() + "]}".len();
    let fitting = all.take_while(|entry| {
        length += entry.len() + 1;
        length <= MAX_BODY
    });
    start + &fitting.collect::<Vec<_>>().join(",") + "]}"
}

pub(crate) const OPENAPI_V2: &str = include_str!("openapi-v2.json");

/// Source: <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/2896-openapi-v3>.
pub(crate) fn openapi_v3_index() -> Value {
    let paths = VERSIONS.map(|version| {
        let (path, hash) = (format!("apis/{GROUP}/{version}"), etag(openapi_v3(version).as_bytes()).replace('"', ""));
        let url = format!("/openapi/v3/{path}?hash={hash}");
        (path, json!({ "serverRelativeURL": url }))
    });
    json!({ "paths": serde_json::Map::from_iter(paths) })
}

pub(crate) fn openapi_v3(version: &str) -> &'static str {
    if version == "v1beta1" { include_str!("openapi-v3-v1beta1.json") } else { include_str!("openapi-v3-v1beta2.json") }
}

/// Media ranges of an `Accept` header that are looked at; clients send three.
const MAX_RANGES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Groups and versions in one document of version `v2` or `v2beta1` of `apidiscovery.k8s.io`.
    Aggregated(&'static str),
    NotAcceptable,
    Plain,
}

/// It need not withstand attack: all bodies are our own. Replicas of one build agree, as the hasher's keys are fixed.
pub(crate) fn etag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(body);
    format!("\"{:016X}\"", hasher.finish())
}

/// Whether `If-None-Match` names this tag, so that 304 is the answer.
/// Source: <https://www.rfc-editor.org/rfc/rfc9110#name-if-none-match>.
pub(crate) fn not_modified(if_none_match: Option<&str>, etag: &str) -> bool {
    let mut tags = if_none_match.unwrap_or_default().split(',').map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

pub(crate) fn accepts_json(accept: Option<&str>) -> bool {
    forms(accept).any(|(quality, form)| quality > 0.0 && form == Form::Plain)
}

pub(crate) fn negotiate_apis(accept: Option<&str>) -> Form {
    forms(accept).fold((0.0, Form::NotAcceptable), |best, found| if found.0 > best.0 { found } else { best }).1
}

fn forms(accept: Option<&str>) -> impl Iterator<Item = (f32, Form)> {
    let accept = accept.filter(|text| text.contains(|c: char| c != ',' && !c.is_whitespace())).unwrap_or("*/*");
    accept.split(',').map(str::trim).filter(|range| !range.is_empty()).take(MAX_RANGES).filter_map(parse_range)
}

/// A range with any of `g`, `v` and `as` asks for another object in place of the plain one (kubectl asks for tables).
/// Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources>.
fn parse_range(text: &str) -> Option<(f32, Form)> {
    let mut parts = text.split(';').map(str::trim);
    let essence = parts.next()?.to_ascii_lowercase();
    let pairs = parts.map(|part| part.split_once('=').unwrap_or((part, "")));
    let pairs = pairs.map(|(key, value)| (key.trim().to_ascii_lowercase(), value.trim().trim_matches('"')));
    let parameters: BTreeMap<_, _> = pairs.collect();
    let [quality, special @ ..] = ["q", "g", "v", "as"].map(|key| parameters.get(key).copied());
    let quality = quality.unwrap_or("1").parse().ok().filter(|weight| (0.0..=1.0).contains(weight))?;
    let form = match (essence.as_str(), special) {
        ("*/*" | "application/*" | "application/json", [None, None, None]) => Form::Plain,
        ("application/json", [Some("apidiscovery.k8s.io"), Some(version), Some("APIGroupDiscoveryList")]) => {
            Form::Aggregated(["v2", "v2beta1"].into_iter().find(|known| *known == version)?)
        }
        _ => return None,
    };
    Some((quality, form))
}

fn entry(resource: &Resource, metric: &str) -> String {
    let (name, namespaced) = (resource.qualified(), resource.is_namespaced());
    format!(
        r#"{{"name":"{name}/{metric}","singularName":"","namespaced":{namespaced},"kind":"MetricValueList","verbs":["get"]}}"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::LONGEST_METRIC;

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
        assert_eq!(
            parsed(&api_group_list()),
            json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [fields] })
        );
        let mut expected = fields;
        expected["kind"] = json!("APIGroup");
        expected["apiVersion"] = json!("v1");
        assert_eq!(parsed(&api_group()), expected);
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
                "services",
                "pods",
                "deployments.apps",
                "statefulsets.apps",
                "daemonsets.apps",
                "replicasets.apps",
                "jobs.batch",
                "nodes",
                "namespaces"
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
                "namespaced": !name.starts_with("namespaces/") && !name.starts_with("nodes/"),
                "kind": "MetricValueList",
                "verbs": ["get"],
            });
            assert_eq!(*resource, expected);
        }
    }

    #[test]
    fn without_a_listable_name_the_well_known_ones_are_listed() {
        let bad = ["", "a/b", "a b", "a\"b", "ä", "a\n", "a%2Fb", "..", ".", &"a".repeat(LONGEST_METRIC + 1)]
            .map(str::to_owned);
        for metrics in [&[][..], &bad] {
            let names = names(&api_resource_list("v1beta2", metrics));
            assert_eq!(names.len(), promql::OWN.lines().count() * Resource::ALL.len());
            assert!(names.contains(&"services/net.http.request.count".to_owned()), "{names:?}");
        }
        let mixed: Vec<String> = bad.into_iter().chain(["ok".to_owned()]).collect();
        assert!(names(&api_resource_list("v1beta2", &mixed)).iter().all(|name| name.ends_with("/ok")));
    }

    #[test]
    fn the_list_is_valid_and_bounded_whatever_the_number_of_metrics() {
        let metrics: Vec<String> = (0..20_000)
            .map(|n| format!("a.custom.metric.{n:05}"))
            .chain(["net.http.request.count".to_owned()])
            .collect();
        let entry_len = entry(&Resource::DEPLOYMENTS, "a.custom.metric.00000").len() + 1;
        let mut last = 0;
        for count in (0..400).step_by(31).chain([999, 20_000]) {
            let body = api_resource_list("v1beta2", &metrics[20_000 - count..]);
            let listed = names(&body);
            assert!(body.len() <= MAX_BODY, "{count}: {}", body.len());
            assert!(listed.contains(&"services/net.http.request.count".to_owned()), "{count}");
            let whole = listed.len() == 9 * (count + 1);
            assert!(whole || body.len() + entry_len > MAX_BODY, "{count}: {} entries", listed.len());
            last = body.len();
        }
        assert!(last > MAX_BODY - entry_len);
        let longest: Vec<String> = (0..800).map(|n| format!("{n:0>LONGEST_METRIC$}")).collect();
        let body = api_resource_list("v1beta2", &longest);
        assert!(body.len() <= MAX_BODY && body.len() > MAX_BODY - 1000);
    }

    fn all() -> [Value; 3] {
        [OPENAPI_V2, openapi_v3("v1beta1"), openapi_v3("v1beta2")].map(parsed)
    }

    /// Every value below `document` that stands under `key`.
    fn under(document: &Value, key: &str) -> Vec<Value> {
        match document {
            Value::Object(map) => {
                map.iter().flat_map(|(k, v)| (k == key).then(|| v.clone()).into_iter().chain(under(v, key))).collect()
            }
            Value::Array(items) => items.iter().flat_map(|item| under(item, key)).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn every_reference_resolves_inside_its_document() {
        for document in all() {
            let references = under(&document, "$ref");
            assert!(references.len() >= 3);
            for reference in references {
                let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
        }
    }

    #[test]
    fn every_operation_has_its_own_id() {
        for (document, operations) in all().iter().zip([6, 3, 3]) {
            let ids = under(document, "operationId");
            assert_eq!(ids.len(), operations);
            assert_eq!(ids.iter().map(Value::to_string).collect::<BTreeSet<_>>().len(), operations);
        }
    }

    #[test]
    fn the_aggregator_keeps_every_path() {
        for document in all() {
            for path in document["paths"].as_object().unwrap().keys() {
                let kept =
                    ["v1beta1", "v1beta2"].map(|v| path.starts_with(&format!("/apis/custom.metrics.k8s.io/{v}/")));
                assert!(kept.contains(&true), "{path}");
            }
        }
    }

    #[test]
    fn every_placeholder_of_a_path_is_a_parameter() {
        for document in all() {
            for (path, item) in document["paths"].as_object().unwrap() {
                let placeholders: BTreeSet<_> =
                    path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}')).collect();
                let parameters = item["get"]["parameters"].as_array().cloned().unwrap_or_default();
                let named: BTreeSet<_> = parameters.iter().filter_map(|parameter| parameter["name"].as_str()).collect();
                assert_eq!(placeholders, named, "{path}");
            }
        }
    }

    #[test]
    fn both_versions_define_their_list_and_nothing_of_kubernetes_itself() {
        let document = parsed(OPENAPI_V2);
        let names: Vec<_> = document["definitions"].as_object().unwrap().keys().map(String::as_str).collect();
        let expected =
            ["v1beta1.MetricValue", "v1beta1.MetricValueList", "v1beta2.MetricValue", "v1beta2.MetricValueList"]
                .map(|name| format!("io.k8s.metrics.pkg.apis.custom_metrics.{name}"));
        assert_eq!(names, expected);
        for (name, definition) in document["definitions"].as_object().unwrap() {
            let kind = &definition["x-kubernetes-group-version-kind"];
            let version = if name.contains("v1beta1") { "v1beta1" } else { "v1beta2" };
            let expected = json!([{ "group": "custom.metrics.k8s.io", "version": version, "kind": "MetricValueList" }]);
            assert!(if name.ends_with("List") { *kind == expected } else { kind.is_null() }, "{name}: {kind}");
        }
    }

    #[test]
    fn a_version_3_document_holds_its_own_version_only() {
        for (version, other) in [("v1beta1", "v1beta2"), ("v1beta2", "v1beta1")] {
            let body = openapi_v3(version);
            assert!(body.contains(version) && !body.contains(other), "{body}");
        }
    }

    #[test]
    fn the_documents_carry_the_version_of_this_release() {
        for document in all() {
            assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn the_index_names_each_document_by_its_hash() {
        let index = openapi_v3_index();
        assert_eq!(index["paths"].as_object().unwrap().len(), 2);
        for version in ["v1beta1", "v1beta2"] {
            let url = &index["paths"][format!("apis/custom.metrics.k8s.io/{version}")]["serverRelativeURL"];
            let hash = etag(openapi_v3(version).as_bytes()).replace('"', "");
            assert_eq!(*url, format!("/openapi/v3/apis/custom.metrics.k8s.io/{version}?hash={hash}"));
        }
    }

    #[test]
    fn accept_chooses_the_form_of_apis() {
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
        let v2beta1 = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
        let (newer, older) = (Form::Aggregated("v2"), Form::Aggregated("v2beta1"));
        let table = [
            (format!("{v2},{v2beta1}"), newer),
            (format!("{v2},{v2beta1},application/json"), newer),
            (format!("{v2beta1}, {v2}, application/json"), older),
            (format!("application/json, {v2}"), Form::Plain),
            (format!("*/*, {v2}"), Form::Plain),
            (format!("{v2};q=0.2, {v2beta1};q=0.9"), older),
            (format!("{v2};q=0, {v2beta1}"), older),
            (format!("{v2};q=0.1, application/json;q=0.5, */*"), Form::Plain),
            (v2beta1.to_owned(), older),
            ("Application/JSON; AS=APIGroupDiscoveryList ; V=\"v2\" ; G=apidiscovery.k8s.io".to_owned(), newer),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList,*/*".to_owned(), Form::Plain),
            ("application/json;v=v2;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/*;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/json".to_owned(), Form::Plain),
            ("application/yaml".to_owned(), Form::NotAcceptable),
            (String::new(), Form::Plain),
        ];
        for (accept, form) in table {
            assert_eq!(negotiate_apis(Some(&accept)), form, "{accept}");
        }
        assert_eq!(negotiate_apis(None), Form::Plain);
    }

    #[test]
    fn json_is_acceptable_unless_refused_or_left_out() {
        let table = [
            ("application/vnd.kubernetes.protobuf, */*", true),
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", true),
            ("application/json; charset=utf-8", true),
            ("text/html, application/*;q=0.1", true),
            ("*/*;q=0.001", true),
            (" , ,", true),
            ("APPLICATION/JSON", true),
            ("application/json;q=1.000", true),
            ("application/json;q=0, application/json", true),
            ("application/vnd.kubernetes.protobuf", false),
            ("application/yaml, text/html", false),
            ("application/json;as=Table;v=v1;g=meta.k8s.io", false),
            ("application/json;q=0", false),
            ("application/json;q=0, */*", true),
            ("application/*;q=0.0, application/yaml", false),
            ("application/json;q=nan", false),
            ("application/json;q=inf", false),
            ("application/json;q=-1", false),
            ("application/json;q=2", false),
            ("application/json;q=", false),
            ("application/jsonp", false),
            ("application", false),
            ("*", false),
            (";;==", false),
            ("é", false),
        ];
        for (accept, acceptable) in table {
            assert_eq!(accepts_json(Some(accept)), acceptable, "{accept}");
        }
        assert!(accepts_json(None));
    }

    #[test]
    fn only_the_first_ranges_of_an_endless_header_count() {
        assert!(accepts_json(Some(&("text/html,".repeat(MAX_RANGES - 1) + "*/*"))));
        assert!(!accepts_json(Some(&("text/html,".repeat(100_000) + "*/*"))));
        assert!(accepts_json(Some(&(",".repeat(1_000_000) + "*/*"))));
        assert!(accepts_json(Some(&("application/json".to_owned() + &";a=b".repeat(250_000)))));
    }

    #[test]
    fn a_tag_is_quoted_hexadecimal_and_follows_the_body() {
        for document in ["", "{}"] {
            let tag = etag(document.as_bytes());
            let hex = tag.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
            assert!(hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)), "{hex}");
            assert_eq!(tag, etag(document.as_bytes()));
        }
        assert_ne!(etag(b"a"), etag(b"b"));
        assert_eq!(etag(b""), etag(b""));
    }

    #[test]
    fn a_known_tag_means_not_modified() {
        let table = [
            (None, false),
            (Some(""), false),
            (Some("\"A1\""), true),
            (Some("W/\"A1\""), true),
            (Some("*"), true),
            (Some("\"B2\", \"A1\""), true),
            (Some(" \"B2\",W/\"A1\" "), true),
            (Some("A1"), false),
            (Some("\"a1\""), false),
            (Some("w/\"A1\""), false),
            (Some("\"B2\""), false),
            (Some("\"A1\"x"), false),
            (Some(",,,"), false),
            (Some("\"*\""), false),
        ];
        for (if_none_match, expected) in table {
            assert_eq!(not_modified(if_none_match, "\"A1\""), expected, "{if_none_match:?}");
        }
    }
}
