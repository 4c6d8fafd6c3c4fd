//! Answers of Sysdig, over HTTP: a value comes from a row about the object asked for, or not at all.
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
use sysdig_metrics_adapter::selector::{Requirement, Tuning};
use sysdig_metrics_adapter::sysdig::{Question, Sysdig};

const NOW: u64 = 1_800_000_000;
const LABELS: [(&str, &str); 2] = [("kubernetes.namespace.name", "default"), ("kubernetes.pod.name", "kuard")];

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
    let status =
        [200, 200, 200, 200, 200, 400, 401, 403, 404, 422, 429, 500, 503, 302, 204, 206][usize::from(first % 16)];
    *lock(answer) = (status, body.to_vec());
    let scope = LABELS.map(|(key, value)| Requirement { key: key.to_owned(), values: vec![value.to_owned()] });
    let question = |metric| Question {
        metric,
        tuning: Tuning { time: "avg", group: "avg", window: 60 },
        host: false,
        by: Some("kubernetes.pod.name"),
        scope: scope.to_vec(),
        labels: &[],
    };
    let (data, promql) = (question("net.http.request.count"), question("queue_depth"));
    let rows = sysdig.rows(&data, NOW);
    readable(&rows);
    if let Ok(rows) = rows {
        assert_eq!(status, 200);
        let sent: Value = serde_json::from_slice(body).expect("only JSON has rows");
        let sent = sent["data"].as_array().expect("rows are a list");
        assert_eq!(rows.len(), sent.len());
        for (row, sent) in rows.iter().zip(sent) {
            let cells = sent["d"].as_array().expect("cells are a list");
            assert_eq!((cells.len(), cells[0].as_str(), cells[1].as_str()), (4, Some("default"), Some("kuard")));
            assert_eq!((row.value.is_none(), row.object.as_str()), (cells[2].is_null(), "kuard"));
            assert_eq!(row.end, sent["t"].as_u64().expect("a time is a number"));
        }
    }
    let rows = sysdig.rows(&promql, NOW);
    readable(&rows);
    for row in rows.unwrap_or_default() {
        let sent: Value = serde_json::from_slice(body).expect("only JSON has rows");
        let series = sent["data"]["result"].as_array().expect("series are a list");
        let own = |it: &&Value| it["metric"]["kube_pod_name"].as_str().unwrap_or_default() == row.object;
        assert!(series.iter().any(|it| own(&it) && it["metric"]["sysdig_metrics_adapter"] == "value"));
        assert!(row.value.is_some() && row.end <= NOW);
    }
    readable(&sysdig.pods(&data, NOW));
    for question in [data, promql] {
        readable(&sysdig.is_collected(&question, NOW));
    }
    readable(&sysdig.catalogue());
});
