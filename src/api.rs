//! What goes over the wire: responses, and the MetricValueList of both versions.
//!
//! Source: <https://github.com/kubernetes/metrics/tree/master/pkg/apis/custom_metrics>.

use serde::Serialize;
use serde_json::json;

use crate::quantity::Quantity;
use crate::route::{AGGREGATION, AVERAGE, GROUP, Read, Resource};
use crate::sysdig::WINDOW;
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

/// The answer to a read: one value of one object, its fields in the order of the walk-through.
/// `end` in Unix seconds is the end of the window of samples that the value sums up.
pub fn metric_value_list(read: &Read, (quantity, end): (Quantity, u64)) -> Response {
    let Resource { kind, api_version, .. } = *read.described;
    let (version, metric) = (read.version, json!(read.metric));
    let selector = (read.aggregation != AVERAGE).then(|| json!({ "matchLabels": { AGGREGATION: read.aggregation } }));
    let namespace = match *read.described {
        Resource::NAMESPACES => String::new(),
        _ => format!(r#""namespace":{},"#, json!(read.namespace)),
    };
    let metric = match version {
        "v1beta1" => format!(r#""metricName":{metric}"#),
        _ => format!(r#""metric":{{"name":{metric},"selector":{}}}"#, json!(selector)),
    };
    let (name, link, timestamp) = (json!(read.name), json!(read.path), rfc3339(end));
    let object = format!(r#"{{"kind":"{kind}",{namespace}"name":{name},"apiVersion":"{api_version}"}}"#);
    let item = format!(
        r#"{{"describedObject":{object},{metric},"timestamp":"{timestamp}","windowSeconds":{WINDOW},"value":"{quantity}"}}"#
    );
    let list = format!(
        r#"{{"kind":"MetricValueList","apiVersion":"{GROUP}/{version}","metadata":{{"selfLink":{link}}},"items":[{item}]}}"#
    );
    Response::bytes(200, JSON, list.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::{Route, route};

    fn answer(target: &str) -> serde_json::Value {
        let Ok(Route::Read(read)) = route("GET", target) else { panic!("{target}") };
        let quantity = Quantity::parse("6.75").unwrap();
        serde_json::from_slice(&metric_value_list(&read, (quantity, 1_562_514_927)).body).unwrap()
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
        let item = &answer(&format!("{path}?metricLabelSelector=sysdig/group-aggregation=sum"))["items"][0];
        let selector = json!({ "matchLabels": { "sysdig/group-aggregation": "sum" } });
        assert_eq!(item["metric"], json!({ "name": "m", "selector": selector }));
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
