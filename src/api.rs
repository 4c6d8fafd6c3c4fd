//! What goes over the wire: responses, the MetricValueList of both versions, and times.
//! Source: <https://github.com/kubernetes/metrics/tree/master/pkg/apis>.

use crate::prelude::*;
use crate::{readings::Item, selector::label_selector};

pub(crate) const JSON: &str = "application/json";

/// An HTTP answer, ready to send.
pub(crate) type Response = tiny_http::Response<std::io::Cursor<Vec<u8>>>;

/// An answer with `more` headers than every answer has.
pub(crate) fn response(status: u16, content_type: &str, body: impl Into<Vec<u8>>, more: &[(&str, &str)]) -> Response {
    let bare = Response::from_data(body).with_status_code(status).with_chunked_threshold(usize::MAX);
    let every = [("Content-Type", content_type), ("Cache-Control", "no-cache, private")];
    let headers = every.iter().chain(more).flat_map(|(name, value)| tiny_http::Header::from_bytes(*name, *value));
    headers.fold(bare, Response::with_header)
}

/// The answer to a read, fields in the order of the walk-through.
pub(crate) fn metric_value_list(read: &Read, path: &str, items: &[Item], window: u64) -> Response {
    let Read { api: (group, version), described, namespace, metric, .. } = read;
    let (Resource { kind, api_version, .. }, selector) = (described, label_selector(&read.selector));
    let place = if described.is_namespaced() { format!(r#""namespace":"{namespace}","#) } else { String::new() };
    let start = format!(r#""describedObject":{{"kind":"{kind}",{place}"name":"#);
    let items = items.iter().map(|(name, quantity, end)| {
        let (name, end) = (json!(if read.name == "*" { name } else { &read.name }), rfc3339(*end));
        let object = format!(r#"{start}{name},"apiVersion":"{api_version}"}}"#);
        let (subject, seconds) = match (*group, *version) {
            (GROUP, "v1beta1") => (format!(r#"{object},"metricName":"{metric}","selector":{selector}"#), "window"),
            (GROUP, _) => (format!(r#"{object},"metric":{{"name":"{metric}","selector":{selector}}}"#), "windowSeconds"),
            _ => (format!(r#""metricName":"{metric}","metricLabels":{{}}"#), "windowSeconds"),
        };
        format!(r#"{{{subject},"timestamp":"{end}","{seconds}":{window},"value":"{quantity}"}}"#)
    });
    let (items, metadata) = (items.collect::<Vec<_>>().join(","), json!({ "selfLink": path }));
    let kind = if *group == EXTERNAL { "ExternalMetricValueList" } else { "MetricValueList" };
    let list = format!(r#"{{"kind":"{kind}","apiVersion":"{group}/{version}","metadata":{metadata},"items":[{items}]}}"#);
    response(200, JSON, list, &[])
}

/// `2019-07-07T15:55:27Z`; later than the year 9999 is shown as its last second. The year starts in March here, so
/// that the leap day ends it. Source: Neri and Schneider, <https://arxiv.org/abs/2102.06959>.
pub(crate) fn rfc3339(unix_seconds: u64) -> String {
    let seconds = unix_seconds.min(253_402_300_799);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Four centuries have 146,097 days, four years 1,461, and five months from March on 153.
    let days = 4 * (seconds / 86_400 + 719_468) + 3;
    let (century, days) = (days / 146_097, 4 * (days % 146_097 / 4) + 3);
    let (year, days) = (days / 1461, 5 * (days % 1461 / 4) + 461);
    let (month, day) = (days / 153, days % 153 / 5 + 1);
    let (month, later) = if month <= 12 { (month, 0) } else { (month - 12, 1) };
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", century * 100 + year + later)
}

/// The second of the day in `Sun, 06 Nov 1994 08:49:37 GMT`. Source: <https://www.rfc-editor.org/rfc/rfc9110#name-date>.
pub(crate) fn second_of_day(http_date: &str) -> Option<i64> {
    let time = http_date.split(' ').nth(4)?.split(':').map(|part| part.parse().ok().filter(|it| (0..60).contains(it)));
    let [hour, minute, second] = time.collect::<Option<Vec<i64>>>()?[..] else { return None };
    Some((hour * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantity::Quantity;
    use crate::route::{Route, route};

    /// The answer with two items of the same value.
    fn answer(target: &str) -> Value {
        let Ok(Route::Read(read)) = route("GET", target, true, &[]) else { panic!("{target}") };
        let item = |name: &str| (name.to_owned(), Quantity::parse("6.75").unwrap(), 1_562_514_927);
        let path = target.split('?').next().unwrap();
        let items = [item("kuard-1"), item("kuard-2")];
        serde_json::from_reader(metric_value_list(&read, path, &items, 60).into_reader()).unwrap()
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
    }

    #[test]
    fn of_many_objects_each_is_named() {
        let answer = answer("/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods/%2A/m?labelSelector=app");
        let names: Vec<_> = answer["items"].as_array().unwrap().iter().map(|it| &it["describedObject"]["name"]).collect();
        assert_eq!(names, ["kuard-1", "kuard-2"]);
    }

    #[test]
    fn an_external_metric_describes_no_object() {
        let path = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default/m";
        let answer = answer(&format!("{path}?labelSelector=a%3Db"));
        assert_eq!(
            (&answer["kind"], &answer["apiVersion"]),
            (&json!("ExternalMetricValueList"), &json!("external.metrics.k8s.io/v1beta1"))
        );
        let expected = json!({ "metricName": "m", "metricLabels": {}, "timestamp": "2019-07-07T15:55:27Z", "windowSeconds": 60, "value": "6750m" });
        assert_eq!(answer["items"][0], expected);
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
        assert_eq!(node["items"][0]["describedObject"], json!({ "kind": "Node", "name": "worker-1", "apiVersion": "v1" }));
    }
}

#[cfg(test)]
mod times {
    use super::*;

    #[test]
    fn the_time_of_day_is_read_from_a_header() {
        let table = [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(31_777)),
            ("Sun, 06 Nov 1994 00:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 23:59:59 GMT", Some(86_399)),
            ("Sun, 06 Nov 1994 08:49:60 GMT", None),
            ("Sun, 06 Nov 1994 08:49 GMT", None),
            ("Sun, 06 Nov 1994 08:49:37:1 GMT", None),
            ("Sun, 06 Nov 1994 -1:00:00 GMT", None),
            ("Sunday, 06-Nov-94 08:49:37 GMT", None),
            ("", None),
        ];
        for (text, seconds) in table {
            assert_eq!(second_of_day(text), seconds, "{text}");
        }
    }

    #[test]
    fn seconds_are_named_as_people_name_them() {
        let table = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_562_514_927, "2019-07-07T15:55:27Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ];
        for (seconds, text) in table {
            assert_eq!(rfc3339(seconds), text);
        }
    }
}
