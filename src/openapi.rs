//! OpenAPI: the paths and types served, as fixed documents of version 2 and 3.
//!
//! kube-apiserver reads `/openapi/v2` every minute and merges what lies under `/apis/GROUP/VERSION/` into its own
//! document, so one mistake here would spoil `kubectl explain` for the whole cluster. Therefore nothing is shared
//! with Kubernetes' documents: every `$ref` stays within its document, Kubernetes' own types are written out in
//! place, and operationIds begin with `readSysdigMetric`.
//! Sources: <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-interface-definition>,
//! <https://spec.openapis.org/oas/v2.0.html>, <https://spec.openapis.org/oas/v3.0.3.html>.

use std::hash::{DefaultHasher, Hasher};
use std::sync::LazyLock;

use serde_json::json;

use crate::route::{ApiVersion, GROUP};

/// A document that never changes while the process runs. Its type is `application/json`.
#[derive(Debug)]
pub struct Static {
    /// JSON.
    pub body: Vec<u8>,
    /// Its `ETag`.
    pub etag: String,
}

static V2: LazyLock<Static> = LazyLock::new(|| fixed(include_bytes!("openapi-v2.json")));
static V3: LazyLock<[Static; 2]> = LazyLock::new(|| {
    [fixed(include_bytes!("openapi-v3-v1beta1.json")), fixed(include_bytes!("openapi-v3-v1beta2.json"))]
});

/// The document of both versions, for `/openapi/v2`.
pub fn v2() -> &'static Static {
    &V2
}

/// Where the version 3 documents are, for `/openapi/v3`. The hash lets clients keep them until they change.
/// Source: <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/2896-openapi-v3>.
pub fn v3_index() -> &'static Static {
    static INDEX: LazyLock<Static> = LazyLock::new(|| {
        let url = |version: ApiVersion| {
            let hash = v3(version).etag.replace('"', "");
            json!({ "serverRelativeURL": format!("/openapi/v3/apis/{GROUP}/{}?hash={hash}", version.name()) })
        };
        let (v1beta1, v1beta2) = (url(ApiVersion::V1Beta1), url(ApiVersion::V1Beta2));
        let paths =
            json!({ "apis/custom.metrics.k8s.io/v1beta1": v1beta1, "apis/custom.metrics.k8s.io/v1beta2": v1beta2 });
        fixed(json!({ "paths": paths }).to_string().as_bytes())
    });
    &INDEX
}

/// The document of one version, for `/openapi/v3/apis/custom.metrics.k8s.io/VERSION`.
pub fn v3(version: ApiVersion) -> &'static Static {
    let [v1beta1, v1beta2] = &*V3;
    match version {
        ApiVersion::V1Beta1 => v1beta1,
        ApiVersion::V1Beta2 => v1beta2,
    }
}

fn fixed(body: &[u8]) -> Static {
    Static { etag: etag(body), body: body.to_vec() }
}

/// The entity tag of a body.
///
/// It need not withstand attack, as all bodies are our own, and 64 bits tell their few versions apart. The hasher's
/// keys are fixed, so replicas of one build agree; another build may hash differently, which costs one more download.
pub fn etag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(body);
    format!("\"{:016X}\"", hasher.finish())
}

/// Whether `If-None-Match` names this tag, so that 304 is the answer.
/// Source: <https://www.rfc-editor.org/rfc/rfc9110#name-if-none-match>.
pub fn not_modified(if_none_match: Option<&str>, etag: &str) -> bool {
    let mut tags = if_none_match.unwrap_or_default().split(',').map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    fn parsed(document: &Static) -> Value {
        serde_json::from_slice(&document.body).unwrap()
    }

    fn all() -> [Value; 3] {
        [v2(), v3(ApiVersion::V1Beta1), v3(ApiVersion::V1Beta2)].map(parsed)
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
        let document = parsed(v2());
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
        for (version, other) in [(ApiVersion::V1Beta1, ApiVersion::V1Beta2), (ApiVersion::V1Beta2, ApiVersion::V1Beta1)]
        {
            let body = String::from_utf8(v3(version).body.clone()).unwrap();
            assert!(body.contains(version.name()) && !body.contains(other.name()), "{body}");
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
        let index = parsed(v3_index());
        assert_eq!(index["paths"].as_object().unwrap().len(), 2);
        for served in [ApiVersion::V1Beta1, ApiVersion::V1Beta2] {
            let version = served.name();
            let url = &index["paths"][format!("apis/custom.metrics.k8s.io/{version}")]["serverRelativeURL"];
            let hash = v3(served).etag.replace('"', "");
            assert_eq!(*url, format!("/openapi/v3/apis/custom.metrics.k8s.io/{version}?hash={hash}"));
        }
    }

    #[test]
    fn a_tag_is_quoted_hexadecimal_and_follows_the_body() {
        for document in [v2(), v3_index()] {
            let hex = document.etag.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
            assert!(hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)), "{hex}");
            assert_eq!(document.etag, etag(&document.body));
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
