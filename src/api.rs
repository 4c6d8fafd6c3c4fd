//! What goes over the wire: responses, and the MetricValueList of both versions.
//!
//! Source: <https://github.com/kubernetes/metrics/tree/master/pkg/apis/custom_metrics>.

use serde::Serialize;

use crate::quantity::Quantity;
use crate::route::{GROUP, Read, Resource};
use crate::timestamp::rfc3339;

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// An HTTP answer, ready to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// A JSON answer.
    pub fn json(status: u16, body: &impl Serialize) -> Self {
        // Only maps with keys that are no strings cannot be serialised, and nothing here has one.
        Self::bytes(status, JSON, serde_json::to_vec(body).unwrap_or_default())
    }

    /// A plain text answer, as health probes get it.
    pub fn text(status: u16, body: &str) -> Self {
        Self::bytes(status, TEXT, body.as_bytes().to_vec())
    }

    /// An answer of any type.
    pub fn bytes(status: u16, content_type: &str, body: Vec<u8>) -> Self {
        Self { status, content_type: content_type.to_owned(), headers: Vec::new(), body }
    }
}

/// A value with the time it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// The number.
    pub quantity: Quantity,
    /// Unix seconds: the end of the window of samples that the number sums up.
    pub timestamp: u64,
    /// Length of that window in seconds.
    pub window_seconds: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MetricValueList<'a> {
    kind: &'static str,
    api_version: String,
    metadata: Metadata<'a>,
    items: [Item<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    self_link: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item<'a> {
    described_object: DescribedObject<'a>,
    #[serde(flatten)]
    name: MetricName<'a>,
    timestamp: String,
    window_seconds: u64,
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DescribedObject<'a> {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    name: &'a str,
    api_version: &'static str,
}

#[derive(Serialize)]
#[serde(untagged)]
enum MetricName<'a> {
    #[serde(rename_all = "camelCase")]
    V1Beta1 {
        metric_name: &'a str,
    },
    V1Beta2 {
        metric: MetricIdentifier<'a>,
    },
}

#[derive(Serialize)]
struct MetricIdentifier<'a> {
    name: &'a str,
    selector: Option<()>,
}

/// The answer to a read: one value of one object.
pub fn metric_value_list(read: &Read, value: Value) -> Response {
    let Resource { kind, api_version, .. } = *read.described;
    let name = match read.version {
        "v1beta1" => MetricName::V1Beta1 { metric_name: &read.metric },
        _ => MetricName::V1Beta2 { metric: MetricIdentifier { name: &read.metric, selector: None } },
    };
    let namespace = (*read.described != Resource::NAMESPACES).then_some(read.namespace.as_str());
    Response::json(
        200,
        &MetricValueList {
            kind: "MetricValueList",
            api_version: format!("{GROUP}/{}", read.version),
            metadata: Metadata { self_link: &read.path },
            items: [Item {
                described_object: DescribedObject { kind, namespace, name: &read.name, api_version },
                name,
                timestamp: rfc3339(value.timestamp),
                window_seconds: value.window_seconds,
                value: value.quantity.to_string(),
            }],
        },
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::route::{Route, route};

    fn answer(target: &str) -> serde_json::Value {
        let Ok(Route::Read(read)) = route("GET", target) else { panic!("{target}") };
        let value = Value { quantity: Quantity::parse("6.75").unwrap(), timestamp: 1_562_514_927, window_seconds: 60 };
        serde_json::from_slice(&metric_value_list(&read, value).body).unwrap()
    }

    #[test]
    fn v1beta1_looks_as_in_the_walk_through() {
        let path = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count";
        let expected = json!({
            "kind": "MetricValueList",
            "apiVersion": "custom.metrics.k8s.io/v1beta1",
            "metadata": { "selfLink": path },
            "items": [{
                "describedObject": { "kind": "Service", "namespace": "default", "name": "kuard", "apiVersion": "v1" },
                "metricName": "net.http.request.count",
                "timestamp": "2019-07-07T15:55:27Z",
                "windowSeconds": 60,
                "value": "6750m",
            }],
        });
        assert_eq!(answer(path), expected);
    }

    #[test]
    fn v1beta2_names_the_metric_as_an_identifier() {
        let path = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/deployments.apps/kuard/m";
        let item = &answer(path)["items"][0];
        assert_eq!(item["metric"], json!({ "name": "m", "selector": null }));
        assert_eq!(item["describedObject"]["apiVersion"], "apps/v1");
        assert!(item.get("metricName").is_none());
    }

    #[test]
    fn the_object_is_named_as_it_was_asked_for() {
        let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default";
        let legacy = answer(&format!("{base}/services/deployment%3Bkuard/m"));
        assert_eq!(legacy["items"][0]["describedObject"]["name"], "deployment;kuard");
        assert_eq!(legacy["items"][0]["describedObject"]["kind"], "Service");
        let namespace = answer(&format!("{base}/metrics/m"));
        assert_eq!(
            namespace["items"][0]["describedObject"],
            json!({ "kind": "Namespace", "name": "default", "apiVersion": "v1" })
        );
    }
}
