//! What goes over the wire: responses, and the MetricValueList of both versions.
//! Source: <https://github.com/kubernetes/metrics/tree/master/pkg/apis/custom_metrics>.

use serde::Serialize;
use serde_json::json;

use crate::readings::Item;
use crate::route::{GROUP, Read, Resource};
use crate::selector::label_selector;
use crate::timestamp::rfc3339;

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// An HTTP answer, ready to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn json(status: u16, body: &impl Serialize) -> Self {
        // Only maps with keys that are no strings cannot be serialised, and nothing here has one.
        Self::bytes(status, JSON, serde_json::to_vec(body).unwrap_or_default())
    }

    pub(crate) fn text(status: u16, body: &str) -> Self {
        Self::bytes(status, TEXT, body.as_bytes().to_vec())
    }

    pub(crate) fn bytes(status: u16, content_type: &str, body: Vec<u8>) -> Self {
        Self { status, content_type: content_type.to_owned(), headers: Vec::new(), body }
    }
}

/// The answer to a read, fields in the order of the walk-through.
pub(crate) fn metric_value_list(read: &Read, items: &[Item]) -> Response {
    let (Read { version, described, tuning, .. }, metric) = (read, json!(read.metric));
    let Resource { kind, api_version, .. } = described;
    let selector = label_selector(&read.selector);
    let (metric, window) = match *version {
        "v1beta1" => (format!(r#""metricName":{metric},"selector":{selector}"#), "window"),
        _ => (format!(r#""metric":{{"name":{metric},"selector":{selector}}}"#), "windowSeconds"),
    };
    let namespace = json!(read.namespace);
    let namespace = if described.is_namespaced() { format!(r#""namespace":{namespace},"#) } else { String::new() };
    let items = items.iter().map(|(name, quantity, end)| {
        let name = if read.name == "*" { json!(name) } else { json!(read.name) };
        let object = format!(r#"{{"kind":"{kind}",{namespace}"name":{name},"apiVersion":"{api_version}"}}"#);
        let (timestamp, seconds) = (rfc3339(*end), tuning.window);
        format!(
            r#"{{"describedObject":{object},{metric},"timestamp":"{timestamp}","{window}":{seconds},"value":"{quantity}"}}"#
        )
    });
    let (items, link) = (items.collect::<Vec<_>>().join(","), json!(read.path));
    let list = format!(
        r#"{{"kind":"MetricValueList","apiVersion":"{GROUP}/{version}","metadata":{{"selfLink":{link}}},"items":[{items}]}}"#
    );
    Response::bytes(200, JSON, list.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantity::Quantity;
    use crate::route::{Route, route};

    /// The answer with two items of the same value.
    fn answer(target: &str) -> serde_json::Value {
        let Ok(Route::Read(read)) = route("GET", target) else { panic!("{target}") };
        let item = |name: &str| (name.to_owned(), Quantity::parse("6.75").unwrap(), 1_562_514_927);
        serde_json::from_slice(&metric_value_list(&read, &[item("kuard-1"), item("kuard-2")]).body).unwrap()
    }

    #[test]
    fn v1beta1_looks_as_in_the_walk_through() {
        let path = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/default/services/kuard/net.http.request.count";
        let mut answer = answer(path);
        answer["items"].as_array_mut().unwrap().truncate(1);
        let expected = json!({
            "kind": "MetricValueList",
            "apiVersion": "custom.metrics.k8s.io/v1beta1",
            "metadata": { "selfLink": path },
            "items": [{
                "describedObject": { "kind": "Service", "namespace": "default", "name": "kuard", "apiVersion": "v1" },
                "metricName": "net.http.request.count",
                "selector": null,
                "timestamp": "2019-07-07T15:55:27Z",
                "window": 60,
                "value": "6750m",
            }],
        });
        assert_eq!(answer, expected);
    }

    #[test]
    fn v1beta2_names_the_metric_as_an_identifier() {
        let path = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/deployments.apps/kuard/m";
        let item = &answer(path)["items"][0];
        assert_eq!(item["metric"], json!({ "name": "m", "selector": null }));
        assert_eq!(item["describedObject"]["apiVersion"], "apps/v1");
        assert!(item.get("metricName").is_none());
        assert_eq!(item["windowSeconds"], 60);
        let selector = "sysdig/group-aggregation=sum,method==GET,sysdig/window=2m";
        let item = &answer(&format!("{path}?metricLabelSelector={selector}"))["items"][0];
        let labels = json!({ "sysdig/group-aggregation": "sum", "method": "GET", "sysdig/window": "2m" });
        assert_eq!(item["metric"], json!({ "name": "m", "selector": { "matchLabels": labels } }));
        assert_eq!(item["windowSeconds"], 120);
    }

    #[test]
    fn of_many_objects_each_is_named() {
        let answer = answer("/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods/%2A/m?labelSelector=app");
        let names: Vec<_> =
            answer["items"].as_array().unwrap().iter().map(|it| &it["describedObject"]["name"]).collect();
        assert_eq!(names, ["kuard-1", "kuard-2"]);
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
        let node = answer("/apis/custom.metrics.k8s.io/v1beta2/nodes/worker-1/m");
        assert_eq!(
            node["items"][0]["describedObject"],
            json!({ "kind": "Node", "name": "worker-1", "apiVersion": "v1" })
        );
    }
}
