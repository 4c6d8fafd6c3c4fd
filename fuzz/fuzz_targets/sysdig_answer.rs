//! Answers of Sysdig, over HTTP: a value comes from a row about an object asked for, or not at all.
#![no_main]

mod readable;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use readable::{TOKEN, readable};
use serde_json::Value;
use support::http::{HttpServer, Reply, lock};
use sysdig_metrics_adapter::config::Config;
use sysdig_metrics_adapter::data::pods;
use sysdig_metrics_adapter::error::Reason;
use sysdig_metrics_adapter::route::Resource;
use sysdig_metrics_adapter::selector::Tuning;
use sysdig_metrics_adapter::sysdig::{Object, Question, Row, Scope, Sysdig};

const NOW: u64 = 1_800_000_000;
const TEMPLATE: &str = "sum by (le, $by) (rate(queue_depth{$matchers}[$window]))";

type Answer = Arc<Mutex<(u16, Vec<u8>)>>;

static STAGE: LazyLock<(HttpServer, Answer, Sysdig)> = LazyLock::new(|| {
    let answer = Answer::default();
    let given = Arc::clone(&answer);
    let server = HttpServer::start(None, move |_| {
        let (status, body) = lock(&given).clone();
        Reply::typed(status, "application/json", body)
    });
    let endpoint = format!("http://127.0.0.1:{}", server.port());
    let config = Config::read(|name| match name {
        "SDC_ENDPOINT" => Some(Ok(endpoint.clone())),
        "SDC_TOKEN" => Some(Ok(TOKEN.to_owned())),
        "CLUSTER_NAME" => Some(Ok("demo".to_owned())),
        _ => None,
    });
    let sysdig = Sysdig::new(&config.expect("the settings are right")).expect("there is no file to read");
    (server, answer, sysdig)
});

fuzz_target!(|bytes: &[u8]| {
    let Some((first, body)) = bytes.split_first() else { return };
    let (_, answer, sysdig) = &*STAGE;
    let status = [200, 200, 200, 200, 200, 400, 401, 403, 404, 422, 429, 500, 503, 302, 204, 206][usize::from(first % 16)];
    *lock(answer) = (status, body.to_vec());
    let objects: Vec<Object> = ["kuard", "web"].map(|name| ("default".to_owned(), name.to_owned())).into();
    let scope: Scope = objects.iter().cloned().unzip();
    let question = |metric: &str, group| Question {
        metric: metric.to_owned(),
        tuning: Tuning { time: "avg", group, window: 60 },
        resource: &Resource::PODS,
        legacy: false,
        labels: Vec::new(),
    };
    let data = question("net.http.request.count", "avg");
    let rows = sysdig.rows(&data, &scope, NOW);
    readable(&rows);
    if let Ok(rows) = rows {
        assert_eq!(status, 200);
        let sent: Value = serde_json::from_slice(body).expect("only JSON has rows");
        let sent = sent["data"].as_array().expect("rows are a list");
        assert!(sent.iter().all(|it| it["d"].as_array().map(Vec::len) == Some(4)));
        let own = |it: &&Value, object: &Object| it["d"][0] == object.0.as_str() && it["d"][1] == object.1.as_str();
        let all: usize = objects.iter().map(|object| sent.iter().filter(|it| own(it, object)).count()).sum();
        assert_eq!(all, sent.len(), "a row about another object is refused");
        for (object, Row { end, value, .. }) in &rows {
            match sent.iter().filter(|it| own(it, object)).collect::<Vec<_>>().as_slice() {
                [one] => assert_eq!((value.is_none(), Some(*end)), (one["d"][2].is_null(), one["t"].as_u64())),
                [_, _, ..] => assert_eq!(*value, Some(Err(Reason::Ambiguous))),
                [] => panic!("{object:?} was not sent"),
            }
        }
    }
    for promql in
        [question("queue_depth", "sum"), question("queue_depth", ""), question("orders_total", "avg"), question(TEMPLATE, "")]
    {
        let rows = sysdig.rows(&promql, &scope, NOW);
        readable(&rows);
        for (object, Row { end, value, .. }) in rows.unwrap_or_default() {
            assert!(objects.contains(&object), "{object:?}");
            let sent: Value = serde_json::from_slice(body).expect("only JSON has rows");
            let series = sent["data"]["result"].as_array().expect("series are a list");
            let label = |it: &Value, name: &str| it["metric"][name].as_str().unwrap_or_default().to_owned();
            let own = |it: &&Value| {
                object == (label(it, "kube_namespace_name"), label(it, "kube_pod_name"))
                    && label(it, "sysdig_metrics_adapter") == "value"
            };
            let values = series.iter().filter(own).count();
            assert!(values >= 1 && value.is_some() && end <= NOW);
            assert!(values == 1 || value == Some(Err(Reason::Ambiguous)));
        }
        readable(&sysdig.is_collected(&promql, NOW));
    }
    let pods = pods(&sysdig, &data, &scope, NOW);
    readable(&pods);
    assert!(pods.is_err() || status == 200);
    readable(&sysdig.is_collected(&data, NOW));
    readable(&sysdig.catalogue());
});
