//! OpenAPI: the paths and types served, as fixed documents of version 2 and 3.
//!
//! kube-apiserver reads `/openapi/v2` every minute and merges what lies under `/apis/GROUP/VERSION/` into its own
//! document, so one mistake here would spoil `kubectl explain` for the whole cluster. Therefore nothing is shared
//! with Kubernetes' documents: every `$ref` stays within its document, Kubernetes' own types are written out in
//! place, and operationIds begin with `readSysdigMetric`.
//! Sources: <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-interface-definition>,
//! <https://spec.openapis.org/oas/v2.0.html>, <https://spec.openapis.org/oas/v3.0.3.html>.

use serde_json::{Value, json};

use crate::accept::etag;
use crate::route::GROUP;

/// The document of both versions, for `/openapi/v2`.
pub const V2: &str = include_str!("openapi-v2.json");

/// Where the version 3 documents are, for `/openapi/v3`. The hash lets clients keep them until they change.
/// Source: <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/2896-openapi-v3>.
pub fn v3_index() -> Value {
    let url = |version: &str| {
        let hash = etag(v3(version).as_bytes()).replace('"', "");
        json!({ "serverRelativeURL": format!("/openapi/v3/apis/{GROUP}/{version}?hash={hash}") })
    };
    let (v1beta1, v1beta2) = (url("v1beta1"), url("v1beta2"));
    json!({ "paths": { "apis/custom.metrics.k8s.io/v1beta1": v1beta1, "apis/custom.metrics.k8s.io/v1beta2": v1beta2 } })
}

/// The document of one version, for `/openapi/v3/apis/custom.metrics.k8s.io/VERSION`.
pub fn v3(version: &str) -> &'static str {
    match version {
        "v1beta1" => include_str!("openapi-v3-v1beta1.json"),
        _ => include_str!("openapi-v3-v1beta2.json"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn parsed(document: &str) -> Value {
        serde_json::from_str(document).unwrap()
    }

    fn all() -> [Value; 3] {
        [V2, v3("v1beta1"), v3("v1beta2")].map(parsed)
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
        let document = parsed(V2);
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
            let body = v3(version);
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
        let index = v3_index();
        assert_eq!(index["paths"].as_object().unwrap().len(), 2);
        for version in ["v1beta1", "v1beta2"] {
            let url = &index["paths"][format!("apis/custom.metrics.k8s.io/{version}")]["serverRelativeURL"];
            let hash = etag(v3(version).as_bytes()).replace('"', "");
            assert_eq!(*url, format!("/openapi/v3/apis/custom.metrics.k8s.io/{version}?hash={hash}"));
        }
    }
}
