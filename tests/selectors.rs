//! Objects by selector and metrics by label, through the Data API, and what hostile values of either come to.

mod support;

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::json;
use support::{Response, Setup, Stage};

const API: &str = "/apis/custom.metrics.k8s.io/v1beta2";
const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default";

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

fn word(response: &Response) -> (u16, String) {
    let status = response.json();
    (response.status, status["details"]["causes"][0]["reason"].as_str().unwrap_or_default().to_owned())
}

fn named(items: &[(&str, &str)]) -> BTreeMap<String, String> {
    items.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// `kuard` with 50, 60 and 70 requests, `web` with 7, of two pods.
fn start() -> Setup {
    let stage = Stage::new();
    stage.deployment("default", "web", 2, &[("net.http.request.count", 7.0)]);
    for (index, container) in stage.sysdig.world().containers_of("default", "kuard").enumerate() {
        let load = 50.0 + 10.0 * index as f64;
        container.metrics.insert("net.http.request.count".to_owned(), load.into());
    }
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    setup
}

#[test]
fn objects_are_selected_by_their_labels_and_asked_for_in_one_query() {
    let setup = start();
    let metric = "net.http.request.count";
    let kuard = [("kuard-0", "50"), ("kuard-1", "60"), ("kuard-2", "70")];
    let all = [kuard.as_slice(), &[("web-0", "7"), ("web-1", "7")]].concat();
    let table: Vec<(String, &[(&str, &str)])> = vec![
        (format!("{BASE}/pods/%2A/{metric}?labelSelector=app%3Dkuard"), &kuard),
        (format!("{BASE}/pods/*/{metric}?labelSelector=app+in+%28kuard%2Cnope%29%2Capp"), &kuard),
        (format!("{BASE}/pods/*/{metric}?labelSelector=app+notin+%28web%29"), &kuard),
        (format!("{BASE}/pods/*/{metric}?labelSelector=app!%3Dkuard"), &[("web-0", "7"), ("web-1", "7")]),
        (format!("{BASE}/pods/*/{metric}?labelSelector=%21nope"), &all),
        (format!("{BASE}/pods/*/{metric}"), &all),
        (format!("{BASE}/deployments.apps/*/{metric}"), &[("kuard", "60"), ("web", "7")]),
        (format!("{BASE}/services/*/{metric}?labelSelector=app%3Dweb"), &[("web", "7")]),
        (format!("{API}/namespaces/*/{metric}"), &[("default", "38800m")]),
    ];
    for (path, expected) in table {
        let before = setup.sysdig.queries().len();
        assert_eq!(setup.read(&path).values(), named(expected), "{path}");
        assert_eq!(setup.sysdig.queries().len(), before + 1, "{path}");
    }
    for (path, expected) in [
        (format!("{BASE}/pods/*/{metric}?labelSelector=app%3Dnope"), (404, "object-not-found")),
        (format!("{BASE}/pods/*/{metric}?labelSelector=app%3D%3D%3Dkuard"), (400, "invalid-request")),
        (format!("{BASE}/pods/*/{metric}?labelSelector=app+in+kuard"), (400, "invalid-request")),
        (format!("{BASE}/pods/kuard-0/{metric}?labelSelector=app%3Dkuard"), (400, "invalid-request")),
        (format!("{API}/nodes/nope/cpu.used.percent"), (404, "object-not-found")),
    ] {
        let found = word(&setup.read(&path));
        assert_eq!((found.0, found.1.as_str()), expected, "{path}");
    }
}

#[test]
fn what_has_finished_or_has_no_samples_has_no_item() {
    let setup = start();
    let path = format!("{BASE}/pods/*/net.http.request.count?labelSelector=app%3Dkuard");
    let labels = json!({ "labels": { "app": "kuard" } });
    let finished = json!({ "metadata": labels, "status": { "phase": "Failed" } });
    setup.kubernetes.object("/api/v1/namespaces/default/pods/kuard-0", finished);
    setup.kubernetes.object("/api/v1/namespaces/default/pods/unseen", json!({ "metadata": labels }));
    assert_eq!(setup.read(&path).values(), named(&[("kuard-1", "60"), ("kuard-2", "70")]));
    setup.sysdig.world().remove_workload("default", "kuard");
    assert_eq!(word(&setup.read(&path)), (404, "no-data".to_owned()), "nothing at all is a refusal");
    for index in 0..1001 {
        let pod = format!("/api/v1/namespaces/default/pods/many-{index}");
        setup.kubernetes.object(&pod, json!({ "metadata": labels }));
    }
    let lists = setup.kubernetes.counter_of("/pods");
    assert_eq!(word(&setup.read(&path)), (404, "no-data".to_owned()));
    assert_eq!(setup.kubernetes.counter_of("/pods"), lists + 3, "objects are listed in pages of 500");
}

#[test]
fn an_idle_pod_is_zero_beside_its_busy_siblings() {
    let setup = start();
    let metric = "net.http.request.count";
    setup.sysdig.world().containers_of("default", "kuard").nth(1).unwrap().metrics.remove(metric);
    let path = format!("{BASE}/pods/*/{metric}?labelSelector=app%3Dkuard");
    assert_eq!(setup.read(&path).values(), named(&[("kuard-0", "50"), ("kuard-1", "0"), ("kuard-2", "70")]));
}

#[test]
fn the_metrics_selector_narrows_the_samples_and_tunes_their_aggregation() {
    let setup = start();
    let read = |selector: &str| {
        let base = format!("{BASE}/services/kuard/net.http.request.count");
        let found = setup.read(&format!("{base}?metricLabelSelector={selector}")).values();
        found["kuard"].clone()
    };
    for (selector, expected) in [
        ("kubernetes.pod.name%3Dkuard-1", "60"),
        ("kube_pod_name%3Dkuard-1", "60"),
        ("container.name%3Dkuard", "60"),
        ("container_name%3Dkuard%2Ckube_pod_name%3Dkuard-2", "70"),
        ("sysdig%2Fgroup-aggregation%3Dmax", "70"),
        ("sysdig%2Fgroup-aggregation%3Dmin%2Csysdig%2Fwindow%3D2m", "50"),
        ("sysdig%2Fgroup-aggregation%3Dsum", "180"),
    ] {
        assert_eq!(read(selector), expected, "{selector}");
    }
    let query = setup.sysdig.queries().into_iter().rev().find(|it| it["end"].as_i64() != it["start"].as_i64()).unwrap();
    assert_eq!(query["dataSourceType"], "container");
}

/// What could end a string, a filter or a query, or mean more than itself, in either language.
fn hostile() -> Vec<String> {
    let pieces =
        ["'", "\"", "\\", "' or 'a' = 'a", "\"} or up{a=\"", ") or (", "|", ".*", "{}", "#", "\n", "\u{0}", "é", "%", "$x"];
    let places = ["{}", "a{}", "{}a", "a{}b", "kuard{}", "{}kuard"];
    pieces.iter().flat_map(|piece| places.iter().map(move |place| place.replace("{}", piece))).collect()
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn nothing_that_a_caller_sends_widens_what_is_asked() {
    let setup = start();
    let mut sent = 0;
    for text in hostile() {
        let text = encoded(&text);
        for path in [
            format!("{BASE}/services/{text}/net.http.request.count"),
            format!("{BASE}/services/kuard/{text}"),
            format!("{API}/namespaces/{text}/services/kuard/net.http.request.count"),
            format!("{BASE}/services/kuard/net.http.request.count?metricLabelSelector=a%3D{text}"),
            format!("{BASE}/services/kuard/net.http.request.count?metricLabelSelector={text}%3Da"),
            format!("{BASE}/services/kuard/m?metricLabelSelector=sysdig%2Fwindow%3D{text}"),
        ] {
            let response = setup.read(&path);
            assert!((400..500).contains(&response.status), "{path}: {}", response.text());
            sent += 1;
        }
        // What this selects is Kubernetes' affair (a line's end is a blank), but it is of this namespace.
        let response = setup.read(&format!("{BASE}/pods/*/net.http.request.count?labelSelector=app%3D{text}"));
        let own = || response.values().keys().all(|name| name.starts_with("kuard-"));
        assert!((400..500).contains(&response.status) || own(), "{text}: {}", response.text());
        sent += 1;
    }
    assert!(sent >= 400, "{sent}");
    for other in ["kubernetes.namespace.name%3Delsewhere", "kube_cluster_name%3Dother", "kubernetes.cluster.name%3Dother"] {
        let path = format!("{BASE}/services/kuard/net.http.request.count?metricLabelSelector={other}");
        assert_eq!(word(&setup.read(&path)), (404, "no-data".to_owned()), "{other} is asked for besides, not instead");
    }
    for query in setup.sysdig.queries() {
        let filter = query["filter"].as_str().unwrap();
        let scope = "kubernetes.cluster.name = 'demo' and kubernetes.namespace.name = 'default' and ";
        assert!(filter.starts_with(scope), "{filter}");
    }
}
