//! Discovery: which groups, versions and metrics there are, their OpenAPI, and the form a client accepts.
//! From memory alone and never empty: a client that gets no valid document here fails for every resource there is.
//! Sources: <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#discovery-api> and
//! <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/3352-aggregated-discovery>.

use crate::prelude::*;
use crate::{definitions::File, promql, route::Api, route::is_metric_id};
use std::{hash::DefaultHasher, hash::Hasher, sync::LazyLock};

/// Largest resource list. The aggregator fetches five copies in parallel every 30 seconds, per version.
const MAX_BODY: usize = 256 * 1024;
/// With external metrics or without, by path or, aggregated, by content type; these list no resources to stay small.
static DOCUMENTS: LazyLock<Value> = LazyLock::new(|| serde_json::from_str(include_str!("discovery.json")).unwrap_or_default());

/// What is the same whatever happens, by its path or the content type of its own.
pub(crate) fn document(path: &str, external: bool) -> Option<String> {
    let openapi = match path.strip_prefix("/openapi/") {
        Some("v2") => include_str!("openapi-v2.json"),
        Some("v3/apis/custom.metrics.k8s.io/v1beta1") => include_str!("openapi-v3-v1beta1.json"),
        Some("v3/apis/custom.metrics.k8s.io/v1beta2") => include_str!("openapi-v3-v1beta2.json"),
        Some("v3/apis/external.metrics.k8s.io/v1beta1") if external => include_str!("openapi-v3-external.json"),
        _ => return DOCUMENTS[external.to_string()].get(path).map(Value::to_string),
    };
    Some(openapi.to_owned())
}

/// The APIResourceList of `/apis/GROUP/VERSION`, `services/net.http.request.count` and so on, to be kept. At most
/// 256 KiB, what is defined, services and well-known metrics first: what is left out can be read all the same.
pub(crate) fn api_resource_list((group, version): Api, metrics: &[String], defined: &'static File) -> String {
    let well_known: Vec<&str> = promql::OWN.lines().filter_map(|line| line.split(' ').next()).collect();
    let own: Vec<&str> = defined.metrics.iter().map(|it| it.name.as_str()).collect();
    let other = |name: &&str| is_metric_id(name) && !own.contains(name);
    let names = metrics.iter().map(String::as_str).filter(other).map(|name| (!well_known.contains(&name), name));
    let names: Vec<&str> = names.collect::<BTreeSet<_>>().into_iter().map(|(_, name)| name).collect();
    let names = if names.is_empty() { well_known } else { names };
    let start = format!(r#"{{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"{group}/{version}","resources":["#);
    let resources = || Resource::all().chain(&defined.resources).take(if group == EXTERNAL { 1 } else { usize::MAX });
    let parts = [own, names];
    let all = parts.iter().flat_map(|names| resources().map(move |resource| (resource, names)));
    let all = all.flat_map(|(resource, names)| names.iter().map(move |name| entry(group, resource, name)));
    let mut length = start.len() + "]}".len();
    let fitting = all.take_while(|entry| {
        length += entry.len() + 1;
        length <= MAX_BODY
    });
    start + &fitting.collect::<Vec<_>>().join(",") + "]}"
}

/// Media ranges of an `Accept` header that are looked at; clients send three.
const MAX_RANGES: usize = 64;

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

/// The content type that `Accept` prefers: JSON or, for `apis`, that of one document for all. Errors: none is acceptable.
pub(crate) fn negotiate(accept: Option<&str>, apis: bool) -> Result<&'static str> {
    let accept = accept.filter(|text| text.contains(|c: char| c != ',' && !c.is_whitespace())).unwrap_or("*/*");
    let ranges = accept.split(',').map(str::trim).filter(|range| !range.is_empty()).take(MAX_RANGES);
    let forms = ranges.filter_map(range).filter(|(quality, form)| *quality > 0.0 && (apis || *form == JSON));
    let best = forms.reduce(|best, found| if found.0 > best.0 { found } else { best });
    let refused = || refusal!(NotAcceptable, "only application/json is served, which Accept does not allow");
    best.map(|(_, form)| form).ok_or_else(refused)
}

/// Quality and content type. With any of `g`, `v` and `as` another object is asked for (kubectl asks for tables).
/// Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources>.
fn range(text: &str) -> Option<(f32, &'static str)> {
    let mut parts = text.split(';').map(str::trim);
    let essence = parts.next()?.to_ascii_lowercase();
    let pairs = parts.map(|part| part.split_once('=').unwrap_or((part, "")));
    let given: BTreeMap<_, _> = pairs.map(|(key, it)| (key.trim().to_ascii_lowercase(), it.trim().trim_matches('"'))).collect();
    let quality = given.get("q").unwrap_or(&"1").parse().ok().filter(|weight| (0.0..=1.0).contains(weight))?;
    let special = ["g", "v", "as"].map(|key| given.get(key).map_or_else(String::new, |it| format!(";{key}={it}")));
    match (essence.as_str(), special.concat().as_str()) {
        ("*/*" | "application/*" | JSON, "") => Some((quality, JSON)),
        (JSON, special) => Some((quality, DOCUMENTS["true"].as_object()?.get_key_value(&format!("{JSON}{special}"))?.0)),
        _ => None,
    }
}

fn entry(group: &str, resource: &Resource, metric: &str) -> String {
    let (name, namespaced, kind) = match group {
        GROUP => (format!("{}/{metric}", resource.qualified()), resource.is_namespaced(), "MetricValueList"),
        _ => (metric.to_owned(), true, "ExternalMetricValueList"),
    };
    format!(r#"{{"name":"{name}","singularName":"","namespaced":{namespaced},"kind":"{kind}","verbs":["get"]}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definitions::Definitions;
    use crate::route::{APIS, LONGEST_METRIC};
    use serde_json::json;
    use std::collections::BTreeSet;

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
            "/apis/custom.metrics.k8s.io/v1beta2", "/healthz", "/livez", "/metrics", "/openapi/v2",
            "/openapi/v3", "/readyz", "/version",
        ] });
        assert_eq!(parsed(&document("/", false).unwrap()), expected);
        assert!(document("/", true).unwrap().contains("/apis/external.metrics.k8s.io/v1beta1"));
    }

    #[test]
    fn the_group_is_the_same_alone_and_in_the_list() {
        let (newer, older) = (
            json!({ "groupVersion": "custom.metrics.k8s.io/v1beta2", "version": "v1beta2" }),
            json!({ "groupVersion": "custom.metrics.k8s.io/v1beta1", "version": "v1beta1" }),
        );
        let fields = json!({ "name": GROUP, "versions": [newer, older], "preferredVersion": newer });
        assert_eq!(
            parsed(&document("/apis", false).unwrap()),
            json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [fields] })
        );
        let mut expected = fields;
        expected["kind"] = json!("APIGroup");
        expected["apiVersion"] = json!("v1");
        assert_eq!(parsed(&document("/apis/custom.metrics.k8s.io", false).unwrap()), expected);
        let both = parsed(&document("/apis", true).unwrap());
        assert_eq!(
            both["groups"][1],
            json!({
                "name": EXTERNAL,
                "versions": [{ "groupVersion": "external.metrics.k8s.io/v1beta1", "version": "v1beta1" }],
                "preferredVersion": { "groupVersion": "external.metrics.k8s.io/v1beta1", "version": "v1beta1" },
            })
        );
    }

    #[test]
    fn the_aggregated_document_names_its_version_and_no_resources() {
        for version in ["v2", "v2beta1"] {
            let form = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
            let document = document(&form, false).unwrap();
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
        let document = api_resource_list((GROUP, "v1beta1"), &metrics, Definitions::default().in_force());
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
    fn what_is_defined_comes_first_and_of_custom_resources_too() {
        let file = br#"{ "metrics": [{ "name": "waiting", "metric": "a" }], "resources":
            [{ "kind": "Queue", "plural": "queues", "apiVersion": "rabbitmq.com/v1beta1", "label": "queue" }] }"#;
        let definitions = Definitions::default();
        definitions.load(Ok(file.to_vec())).unwrap();
        let metrics: Vec<String> = (0..20_000).map(|n| format!("a.{n}")).chain(["waiting".to_owned()]).collect();
        let listed = names(&api_resource_list((GROUP, "v1beta2"), &metrics, definitions.in_force()));
        let first = Resource::all().map(|it| format!("{}/waiting", it.qualified()));
        assert_eq!(listed[..9], first.collect::<Vec<_>>());
        assert_eq!(listed[9..11], ["queues.rabbitmq.com/waiting", "services/a.0"]);
        assert_eq!(listed.iter().filter(|name| *name == "services/waiting").count(), 1);
        let few = names(&api_resource_list((GROUP, "v1beta2"), &metrics[..2], definitions.in_force()));
        assert!(few.contains(&"queues.rabbitmq.com/a.1".to_owned()) && few.len() == 10 * 3, "{few:?}");
        let external = names(&api_resource_list((EXTERNAL, "v1beta1"), &metrics[..1], definitions.in_force()));
        assert_eq!(external, ["waiting", "a.0"]);
    }

    #[test]
    fn without_a_listable_name_the_well_known_ones_are_listed() {
        let bad = ["", "a/b", "a b", "a\"b", "ä", "a\n", "a%2Fb", "..", ".", &"a".repeat(LONGEST_METRIC + 1)].map(str::to_owned);
        for metrics in [&[][..], &bad] {
            let names = names(&api_resource_list((GROUP, "v1beta2"), metrics, Definitions::default().in_force()));
            assert_eq!(names.len(), promql::OWN.lines().count() * Resource::all().count());
            assert!(names.contains(&"services/net.http.request.count".to_owned()), "{names:?}");
        }
        let mixed: Vec<String> = bad.into_iter().chain(["ok".to_owned()]).collect();
        assert!(
            names(&api_resource_list((GROUP, "v1beta2"), &mixed, Definitions::default().in_force()))
                .iter()
                .all(|name| name.ends_with("/ok"))
        );
    }

    #[test]
    fn the_list_is_valid_and_bounded_whatever_the_number_of_metrics() {
        let metrics: Vec<String> =
            (0..20_000).map(|n| format!("a.custom.metric.{n:05}")).chain(["net.http.request.count".to_owned()]).collect();
        let entry_len = entry(GROUP, &Resource::DEPLOYMENTS, "a.custom.metric.00000").len() + 1;
        let mut last = 0;
        for count in (0..400).step_by(31).chain([999, 20_000]) {
            let body = api_resource_list((GROUP, "v1beta2"), &metrics[20_000 - count..], Definitions::default().in_force());
            let listed = names(&body);
            assert!(body.len() <= MAX_BODY, "{count}: {}", body.len());
            assert!(listed.contains(&"services/net.http.request.count".to_owned()), "{count}");
            let whole = listed.len() == 9 * (count + 1);
            assert!(whole || body.len() + entry_len > MAX_BODY, "{count}: {} entries", listed.len());
            last = body.len();
        }
        assert!(last > MAX_BODY - entry_len);
        let longest: Vec<String> = (0..800).map(|n| format!("{n:0>LONGEST_METRIC$}")).collect();
        let body = api_resource_list((GROUP, "v1beta2"), &longest, Definitions::default().in_force());
        assert!(body.len() <= MAX_BODY && body.len() > MAX_BODY - 1000);
    }

    fn openapi(api: Api) -> String {
        document(&format!("/openapi/v3/apis/{}/{}", api.0, api.1), true).unwrap()
    }

    fn all() -> [Value; 4] {
        let [newer, older, external] = APIS.map(openapi);
        [document("/openapi/v2", false).unwrap(), older, newer, external].map(|text| parsed(&text))
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
            assert!(references.len() >= 2);
            for reference in references {
                let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
        }
    }

    #[test]
    fn every_operation_has_its_own_id() {
        for (document, operations) in all().iter().zip([6, 3, 3, 2]) {
            let ids = under(document, "operationId");
            assert_eq!(ids.len(), operations);
            assert_eq!(ids.iter().map(Value::to_string).collect::<BTreeSet<_>>().len(), operations);
        }
    }

    #[test]
    fn the_aggregator_keeps_every_path() {
        for document in all() {
            for path in document["paths"].as_object().unwrap().keys() {
                let served = |api: &Api| path.starts_with(&format!("/apis/{}/{}/", api.0, api.1));
                assert!(APIS.iter().any(served), "{path}");
            }
        }
    }

    #[test]
    fn every_placeholder_of_a_path_is_a_parameter() {
        for document in all() {
            for (path, item) in document["paths"].as_object().unwrap() {
                let placeholders: BTreeSet<_> = path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}')).collect();
                let parameters = item["get"]["parameters"].as_array().cloned().unwrap_or_default();
                let named: BTreeSet<_> = parameters.iter().filter_map(|parameter| parameter["name"].as_str()).collect();
                assert_eq!(placeholders, named, "{path}");
            }
        }
    }

    #[test]
    fn both_versions_define_their_list_and_nothing_of_kubernetes_itself() {
        let document = parsed(&document("/openapi/v2", false).unwrap());
        let names: Vec<_> = document["definitions"].as_object().unwrap().keys().map(String::as_str).collect();
        let expected = ["v1beta1.MetricValue", "v1beta1.MetricValueList", "v1beta2.MetricValue", "v1beta2.MetricValueList"]
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
            let body = openapi((GROUP, version));
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
        for external in [false, true] {
            let index = parsed(&document("/openapi/v3", external).unwrap());
            let served = &APIS[..if external { 3 } else { 2 }];
            assert_eq!(index["paths"].as_object().unwrap().len(), served.len());
            for api in served {
                let path = format!("apis/{}/{}", api.0, api.1);
                let hash = etag(openapi(*api).as_bytes()).replace('"', "");
                assert_eq!(index["paths"][&path]["serverRelativeURL"], format!("/openapi/v3/{path}?hash={hash}"));
            }
        }
    }

    #[test]
    fn accept_chooses_the_form_of_apis() {
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
        let v2beta1 = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
        let (newer, older, plain) = (Some(v2), Some(v2beta1), Some(JSON));
        let table = [
            (format!("{v2},{v2beta1}"), newer),
            (format!("{v2},{v2beta1},application/json"), newer),
            (format!("{v2beta1}, {v2}, application/json"), older),
            (format!("application/json, {v2}"), plain),
            (format!("*/*, {v2}"), plain),
            (format!("{v2};q=0.2, {v2beta1};q=0.9"), older),
            (format!("{v2};q=0, {v2beta1}"), older),
            (format!("{v2};q=0.1, application/json;q=0.5, */*"), plain),
            (v2beta1.to_owned(), older),
            ("Application/JSON; AS=APIGroupDiscoveryList ; V=\"v2\" ; G=apidiscovery.k8s.io".to_owned(), newer),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList".to_owned(), None),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList,*/*".to_owned(), plain),
            ("application/json;v=v2;as=APIGroupDiscoveryList".to_owned(), None),
            ("application/*;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList".to_owned(), None),
            ("application/json".to_owned(), plain),
            ("application/yaml".to_owned(), None),
            (String::new(), plain),
        ];
        for (accept, form) in table {
            assert_eq!(negotiate(Some(&accept), true).ok(), form, "{accept}");
        }
        assert_eq!(negotiate(None, true).ok(), plain);
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
            assert_eq!(negotiate(Some(accept), false).is_ok(), acceptable, "{accept}");
        }
        assert!(negotiate(None, false).is_ok());
    }

    #[test]
    fn only_the_first_ranges_of_an_endless_header_count() {
        let accepts_json = |accept: &str| negotiate(Some(accept), false).is_ok();
        assert!(accepts_json(&("text/html,".repeat(MAX_RANGES - 1) + "*/*")));
        assert!(!accepts_json(&("text/html,".repeat(100_000) + "*/*")));
        assert!(accepts_json(&(",".repeat(1_000_000) + "*/*")));
        assert!(accepts_json(&("application/json".to_owned() + &";a=b".repeat(250_000))));
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
