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
use sysdig_metrics_adapter::sysdig::Sysdig;

const NOW: u64 = 1_800_000_000;
const LABELS: [(&str, &str); 2] = [("kubernetes.namespace.name", "default"), ("kubernetes.service.name", "kuard")];

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
    let row = sysdig.row("net.http.request.count", "avg", &LABELS, NOW);
    readable(&row);
    if let Ok(Some(row)) = row {
        assert_eq!(status, 200);
        let sent: Value = serde_json::from_slice(body).expect("only JSON has rows");
        let rows = sent["data"].as_array().expect("rows are a list");
        assert_eq!(rows.len(), 1);
        let cells = rows[0]["d"].as_array().expect("cells are a list");
        assert_eq!((cells.len(), cells[0].as_str(), cells[1].as_str()), (4, Some("default"), Some("kuard")));
        assert_eq!(row.value.is_none(), cells[2].is_null());
        assert_eq!(row.end, rows[0]["t"].as_u64().expect("a time is a number"));
    }
    readable(&sysdig.pods(&LABELS, NOW));
    readable(&sysdig.is_collected("net.http.request.count", NOW));
    readable(&sysdig.catalogue());
});
