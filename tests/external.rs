//! Metrics that describe no object: off unless they are asked for, and never of another namespace.

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::process::Command;

use prometheus::{Prometheus, Samples, missing};
use serde_json::{Value, json};
use support::{CLUSTER, METRIC, Response, Setup, Stage, TOKEN};

const GROUP: &str = "external.metrics.k8s.io";
const API: &str = "/apis/external.metrics.k8s.io/v1beta1";
const BASE: &str = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default";
/// Samples reach into the future, so that there are some however long a test takes.
const ONGOING: i64 = -1200;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// `kuard` with 50, 60 and 70 requests, in another namespace and in another cluster with others.
fn stage() -> Stage {
    let stage = Stage::new();
    stage.deployment("elsewhere", "kuard", 3, &[(METRIC, 700.0)]);
    let mut world = stage.sysdig.world();
    for (index, container) in world.containers_of("default", "kuard").enumerate() {
        container.metrics.insert(METRIC.to_owned(), (50.0 + 10.0 * index as f64).into());
    }
    world.deployment("other", "default", "kuard", Some("kuard"), 3, &[(METRIC, 9000.0)]);
    drop(world);
    let slot = json!({ "spec": {
        "group": GROUP, "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
        "service": { "name": "api", "namespace": "custom-metrics", "port": 443 },
    } });
    stage.kubernetes.object(&format!("/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.{GROUP}"), slot);
    stage
}

fn start(stage: Stage, overrides: &[(&'static str, String)]) -> Setup {
    let overrides = [overrides, &[("EXTERNAL_METRICS", "true".to_owned())]].concat();
    let setup = stage.start(binary(), &overrides);
    setup.adapter.wait_ready(&setup.client);
    setup
}

/// The one item of a list of external metrics.
#[track_caller]
fn item(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.text());
    let list = response.json();
    let expected = (&json!("ExternalMetricValueList"), &json!(format!("{GROUP}/v1beta1")));
    assert_eq!((&list["kind"], &list["apiVersion"]), expected, "{list}");
    let items = list["items"].as_array().unwrap();
    assert_eq!(items.len(), 1, "{list}");
    items[0].clone()
}

/// `/apis` in the aggregated form.
fn aggregated(setup: &Setup) -> Value {
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let headers = [("X-Remote-User", "admin"), ("X-Remote-Group", "system:masters"), ("Accept", accept)];
    setup.client.request("GET", "/apis", &headers).json()
}

#[test]
fn without_the_setting_there_is_no_such_group_anywhere() {
    for setting in ["", "false"] {
        let setup = stage().start(binary(), &[("EXTERNAL_METRICS", setting.to_owned())]);
        setup.adapter.wait_ready(&setup.client);
        let paths = [
            format!("/apis/{GROUP}"),
            API.to_owned(),
            format!("{BASE}/{METRIC}"),
            format!("{BASE}/{METRIC}?labelSelector=a%3Db"),
            format!("/openapi/v3/apis/{GROUP}/v1beta1"),
        ];
        for path in paths {
            assert_eq!(setup.read(&path).refusal().1, "not-found", "{setting:?} {path}");
        }
        for path in ["/", "/apis", "/openapi/v2", "/openapi/v3"] {
            let headers = [("X-Remote-User", "admin"), ("X-Remote-Group", "system:masters")];
            let response = setup.client.request("GET", path, &headers);
            assert!(response.status == 200 && !response.text().contains(GROUP), "{setting:?} {path}");
        }
        assert!(!aggregated(&setup).to_string().contains(GROUP));
        assert!(setup.sysdig.queries().is_empty());
    }
    let mut env = stage().env();
    env.push(("EXTERNAL_METRICS", "yes".to_owned()));
    let adapter = support::Adapter::spawn(binary(), &env);
    assert_eq!(adapter.wait_exit(std::time::Duration::from_secs(10)).unwrap().code(), Some(2), "{}", adapter.log());
    assert!(adapter.log().contains("EXTERNAL_METRICS"), "{}", adapter.log());
}

#[test]
fn with_the_setting_it_is_discovered_in_every_form() {
    let setup = start(stage(), &[]);
    let version = json!({ "groupVersion": format!("{GROUP}/v1beta1"), "version": "v1beta1" });
    let groups = setup.read("/apis").json();
    let group = groups["groups"].as_array().unwrap().iter().find(|it| it["name"] == GROUP).unwrap();
    assert_eq!((&group["preferredVersion"], &group["versions"]), (&version, &json!([version])));
    let group = setup.read(&format!("/apis/{GROUP}")).json();
    assert_eq!((&group["kind"], &group["preferredVersion"]), (&json!("APIGroup"), &version));

    let list = setup.read(API).json();
    assert_eq!((&list["kind"], &list["groupVersion"]), (&json!("APIResourceList"), &version["groupVersion"]));
    let resources = list["resources"].as_array().unwrap();
    let metric = resources.iter().find(|it| it["name"] == METRIC).unwrap_or_else(|| panic!("{list}"));
    let described = ["kind", "namespaced", "verbs"].map(|key| &metric[key]);
    assert_eq!(described, [&json!("ExternalMetricValueList"), &json!(true), &json!(["get"])], "{metric}");
    assert!(resources.iter().all(|it| !it["name"].as_str().unwrap().contains('/')), "no metric is of an object");

    let found = aggregated(&setup);
    let item = found["items"].as_array().unwrap().iter().find(|it| it["metadata"]["name"] == GROUP).unwrap();
    assert_eq!((&item["versions"][0]["version"], item["versions"].as_array().map(Vec::len)), (&json!("v1beta1"), Some(1)));
    assert_eq!(item["versions"][0]["freshness"], "Current");
    let custom = found["items"].as_array().unwrap().iter().filter(|it| it["metadata"]["name"] != GROUP).count();
    assert_eq!(custom, 1, "the other group is there as before");

    let index = setup.read("/openapi/v3").json();
    let place = format!("apis/{GROUP}/v1beta1");
    let url = index["paths"][&place]["serverRelativeURL"].as_str().unwrap();
    let (path, hash) = url.split_once("?hash=").unwrap();
    assert!(!hash.is_empty());
    let document = setup.read(path).json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."), "{url}");
    assert!(document["components"]["schemas"].to_string().contains("ExternalMetricValueList"));
    assert!(setup.sysdig.queries().is_empty());
}

#[test]
fn a_metric_is_read_by_its_id_for_what_its_selector_names() {
    let setup = start(stage(), &[]);
    for (selector, value) in [
        ("", "60"),
        ("?labelSelector=", "60"),
        ("?labelSelector=kubernetes.pod.name%3Dkuard-2", "70"),
        ("?labelSelector=kube_pod_name%3Dkuard-2", "70"),
        ("?labelSelector=kubernetes.pod.name+in+%28kuard-0%2Ckuard-1%29%2Ccontainer.name", "55"),
        ("?labelSelector=kubernetes.pod.name%21%3Dkuard-2", "55"),
        ("?labelSelector=sysdig%2Fgroup-aggregation%3Dsum", "180"),
        ("?labelSelector=sysdig%2Fgroup-aggregation%3Dmax%2Csysdig%2Fwindow%3D2m", "70"),
    ] {
        let found = item(&setup.read(&format!("{BASE}/{METRIC}{selector}")));
        assert_eq!(found["value"], value, "{selector}");
        assert_eq!((&found["metricName"], &found["metricLabels"]), (&json!(METRIC), &json!({})));
        assert!(found["timestamp"].is_string() && found.get("describedObject").is_none(), "{found}");
    }
    let elsewhere = BASE.replace("default", "elsewhere");
    assert_eq!(item(&setup.read(&format!("{elsewhere}/{METRIC}")))["value"], "700");
    for (path, code, word) in [
        (format!("{BASE}/no.such.metric"), 404, "backend-rejected"),
        (format!("{BASE}/{METRIC}?labelSelector=kubernetes.pod.name%3Dnope"), 404, "no-data"),
        (format!("{BASE}/{METRIC}?labelSelector=a+b"), 400, "invalid-request"),
        (format!("{BASE}/{METRIC}?labelSelector=sysdig%2Fwindow%3D1s"), 400, "invalid-request"),
        (format!("{BASE}/{METRIC}?watch=true"), 400, "invalid-request"),
        (format!("{BASE}/services/kuard/{METRIC}"), 404, "not-found"),
        (format!("{API}/{METRIC}"), 404, "not-found"),
        (format!("{API}/nodes/a/{METRIC}"), 404, "not-found"),
    ] {
        let (found, reason, message) = setup.read(&path).refusal();
        assert_eq!((found, reason.as_str()), (code, word), "{path}: {message}");
    }
    let denied = setup.client.get_as("joe", &[], &format!("{BASE}/{METRIC}"));
    let (code, word, message) = denied.refusal();
    assert_eq!((code, word.as_str()), (403, "forbidden"));
    assert!(message.contains(&format!("cannot list resource \"{METRIC}\" in API group \"{GROUP}\"")), "{message}");
}

#[test]
fn no_selector_leaves_the_namespace_or_the_cluster() {
    let setup = start(stage(), &[]);
    let mut asked = 0;
    for selector in [
        "kubernetes.namespace.name=elsewhere",
        "kube_namespace_name=elsewhere",
        "kubernetes.namespace.name!=default",
        "kubernetes.namespace.name in (elsewhere,other)",
        "!kubernetes.namespace.name",
        "kubernetes.cluster.name=other",
        "kube_cluster_name=other",
        "kubernetes.cluster.name notin (demo)",
    ] {
        let encoded: String = selector.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let (_, word, message) = setup.read(&format!("{BASE}/{METRIC}?labelSelector={encoded}")).refusal();
        assert_eq!(word, "no-data", "{selector}: {message}");
        asked += 1;
    }
    let queries = setup.sysdig.queries();
    assert!(queries.len() >= asked);
    for query in queries {
        let filter = query["filter"].as_str().unwrap();
        let scope = format!("kubernetes.cluster.name = '{CLUSTER}' and kubernetes.namespace.name = 'default' and ");
        assert!(filter.starts_with(&scope), "{filter}");
    }
    let nowhere = setup.read(&format!("{API}/namespaces/*/{METRIC}"));
    assert!(nowhere.status >= 400, "no name stands for all namespaces: {}", nowhere.text());
}

#[test]
fn a_definition_may_have_the_scope_of_the_cluster() {
    let stage = stage();
    let sum = "sysdig/group-aggregation=sum";
    let metrics = json!({ "metrics": [
        { "name": "requests_of_all", "metric": METRIC, "scope": "cluster", "selector": sum, "divideBy": 10 },
        { "name": "requests_here", "metric": METRIC, "selector": sum },
    ] });
    let file = stage.dir.write("metrics.json", metrics.to_string()).display().to_string();
    let setup = start(stage, &[("CONFIG_FILE", file)]);
    for namespace in ["default", "elsewhere"] {
        let path = format!("{API}/namespaces/{namespace}/requests_of_all");
        assert_eq!(item(&setup.read(&path))["value"], "228", "180 and 2100, and nothing of another cluster");
    }
    assert_eq!(item(&setup.read(&format!("{BASE}/requests_here")))["value"], "180");
    let filters: Vec<String> = setup.sysdig.queries().iter().map(|it| it["filter"].as_str().unwrap().to_owned()).collect();
    assert!(filters.contains(&format!("kubernetes.cluster.name = '{CLUSTER}'")), "{filters:#?}");
    let list = setup.read(API).text();
    assert!(list.contains("\"requests_of_all\"") && list.contains("\"requests_here\""), "{list}");
}

#[test]
fn in_promql_a_metric_of_several_series_is_refused_with_what_tells_them_apart() {
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let series = |cluster: &str, namespace: &str, queue: &str, first: f64| {
        let labels = format!(r#"kube_cluster_name="{cluster}",kube_namespace_name="{namespace}",queue="{queue}",zone="a""#);
        Samples { series: format!("queue_depth{{{labels}}}"), first, step: 0.0, newest: ONGOING }
    };
    let samples = [
        series("demo", "default", "mail", 5.0),
        series("demo", "default", "print", 7.0),
        series("demo", "elsewhere", "mail", 100.0),
        series("other", "default", "mail", 1000.0),
    ];
    let prometheus = Prometheus::start(TOKEN, &samples);
    let setup = start(stage(), &[("SDC_ENDPOINT", prometheus.url())]);
    let (code, word, message) = setup.read(&format!("{BASE}/queue_depth")).refusal();
    assert_eq!((code, word.as_str()), (422, "ambiguous"), "{message}");
    assert!(message.contains("differ in queue (\"mail\", \"print\"): select one"), "{message}");
    assert!(!message.contains("zone") && !message.contains("kube_"), "only what differs: {message}");
    for (selector, value) in [
        ("queue%3Dmail", "5"),
        ("queue%3Dprint", "7"),
        ("queue+notin+%28mail%29", "7"),
        ("queue%3Dmail%2Czone", "5"),
        ("sysdig%2Fgroup-aggregation%3Dsum", "12"),
        ("sysdig%2Fgroup-aggregation%3Dmax", "7"),
    ] {
        let found = item(&setup.read(&format!("{BASE}/queue_depth?labelSelector={selector}")));
        assert_eq!(found["value"], value, "{selector}");
    }
    let elsewhere = BASE.replace("default", "elsewhere");
    assert_eq!(item(&setup.read(&format!("{elsewhere}/queue_depth")))["value"], "100");
    for selector in ["kube_namespace_name%3Delsewhere", "kube_cluster_name%3Dother", "queue%3Dnope", "%21queue"] {
        let (_, word, message) = setup.read(&format!("{BASE}/queue_depth?labelSelector={selector}")).refusal();
        assert_eq!(word, "no-data", "{selector}: {message}");
    }
    for (_, query) in prometheus.queries() {
        let (selectors, scope) = (query.matches('{').count(), "{kube_cluster_name=~\"demo\",kube_namespace_name=~\"");
        assert_eq!(query.matches(scope).count(), selectors, "{query}");
    }
}
