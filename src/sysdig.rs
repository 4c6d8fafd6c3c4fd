//! Sysdig Monitor's Data API: one question of one metric of one object, and the catalogue of metrics.
//!
//! Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::{Method, Request};
use ureq::{Agent, Proxy};

use crate::config::{Config, Secret, TokenSource};
use crate::error::{Error, Reason, quoted, refusal};
use crate::quantity::Quantity;
use crate::tls::{Roots, agent, certificates, explain};

/// Seconds of samples that a value sums up.
pub const WINDOW: u64 = 60;
/// Seconds between samples.
const STEP: u64 = 10;
/// Every container has it, whatever its traffic: where it has a value, silence of another metric means idleness.
const COMPANION: &str = "container.count";
const CLUSTER: &str = "kubernetes.cluster.name";
const POD: &str = "kubernetes.pod.name";
const LARGEST_ANSWER: u64 = 8 * 1024 * 1024;
const CATALOGUE_PAGE: usize = 1000;
const CATALOGUE_PAGES: usize = 20;
const MOST_PODS: usize = 1000;

/// A label and the value it must have.
pub type Label<'a> = (&'static str, &'a str);

/// What Sysdig has for one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Unix seconds: end of the window.
    pub end: u64,
    /// The metric; None if no container of the object had a sample of it.
    pub value: Option<Result<Quantity, Reason>>,
}

/// The Data API of one Sysdig account.
pub struct Sysdig {
    agent: Agent,
    endpoint: String,
    token: TokenSource,
    cluster: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    data: Vec<DataRow>,
}

#[derive(Deserialize)]
struct DataRow {
    t: u64,
    d: Vec<Value>,
}

impl Sysdig {
    /// Uses the endpoint, token and cluster of `config`. Errors: `SDC_CA_FILE` or a proxy variable is wrong.
    pub fn new(config: &Config) -> Result<Self, String> {
        let read = |path: &PathBuf| {
            let pem = std::fs::read(path).map_err(|error| error.to_string());
            let found = pem.and_then(|pem| certificates(&pem));
            found.map_err(|mistake| format!("SDC_CA_FILE {}: {mistake}", path.display()))
        };
        let roots = config.sysdig_ca_file.as_ref().map(read).transpose()?.map_or(Roots::Mozilla, Roots::Given);
        Ok(Self {
            agent: agent(roots, config.sysdig_timeout, Proxy::try_from_env()),
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
            cluster: config.cluster.clone(),
        })
    }

    /// Makes sure that the settings a read needs are there.
    /// Errors: [`Reason::NotConfigured`], with the command that mends it.
    pub fn check_configured(&self) -> Result<(), Error> {
        self.token()?;
        self.cluster().map(|_| ())
    }

    /// The value of `metric` over the last full window for the object that `labels` name, averaged over time
    /// and joined over its containers by `group`: `avg` is load per pod, or `sum`. None if Sysdig knows no such object.
    /// Errors: Sysdig failed, or its answer is not about this one object.
    pub fn row(&self, metric: &str, group: &str, labels: &[Label<'_>], now: u64) -> Result<Option<Row>, Error> {
        let end = window_end(now);
        let mut columns: Vec<Value> = labels.iter().map(|(id, _)| json!({ "id": id })).collect();
        columns.push(column(metric, group));
        if metric != COMPANION {
            columns.push(column(COMPANION, "sum"));
        }
        let rows = self.data(end.saturating_sub(WINDOW), end, &self.filter(labels)?, &columns, 1)?;
        let [row] = rows.as_slice() else {
            let object = labels.last().map_or("the cluster", |(_, value)| value);
            let ambiguous = || refusal!(Ambiguous, "Sysdig has more than one series of {metric} for {object}");
            return if rows.is_empty() { Ok(None) } else { Err(ambiguous()) };
        };
        if !labels.iter().zip(&row.d).all(|((_, wanted), found)| found.as_str() == Some(wanted)) {
            return Err(invalid_answer("it is about another object than asked for"));
        }
        if row.t > now + WINDOW {
            let ahead = row.t.saturating_sub(now);
            return Err(invalid_answer(&format!("it is {ahead} s ahead of this node's clock: check the node's time")));
        }
        let value = match row.d.get(labels.len()) {
            None | Some(Value::Null) => None,
            Some(Value::Number(number)) => Some(Quantity::parse(&number.to_string())),
            Some(_) => return Err(invalid_answer("a metric's value is no number")),
        };
        Ok(Some(Row { end: row.t, value }))
    }

    /// How many pods of the object Sysdig saw in the window that [`Self::row`] sums up. Errors: Sysdig failed.
    pub fn pods(&self, labels: &[Label<'_>], now: u64) -> Result<u64, Error> {
        let end = window_end(now);
        let columns = [json!({ "id": POD }), column(COMPANION, "avg")];
        let rows = self.data(end.saturating_sub(WINDOW), end, &self.filter(labels)?, &columns, MOST_PODS - 1)?;
        Ok(rows.iter().filter(|row| row.d.iter().all(|cell| !cell.is_null())).count() as u64)
    }

    /// Whether anything in the cluster had a sample of `metric` within a day. Errors: Sysdig failed.
    pub fn is_collected(&self, metric: &str, now: u64) -> Result<bool, Error> {
        let end = window_end(now);
        let rows = self.data(end.saturating_sub(86_400), end, &self.filter(&[])?, &[column(metric, "avg")], 0)?;
        Ok(rows.iter().any(|row| row.d.iter().any(|cell| !cell.is_null())))
    }

    /// The ids of all metrics, from the catalogue's pages. Errors: Sysdig failed.
    pub fn catalogue(&self) -> Result<Vec<String>, Error> {
        let mut ids = Vec::new();
        for page in 0..CATALOGUE_PAGES {
            let path = format!("/api/v2/metrics/descriptors?limit={CATALOGUE_PAGE}&offset={}", page * CATALOGUE_PAGE);
            let found: Value = self.ask(&path, None)?;
            let Some(list) = found.pointer("/metricDescriptors").and_then(Value::as_array) else {
                return Err(invalid_answer("metricDescriptors is missing"));
            };
            let text = |it: &Value, key: &str| it.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let metrics = list.iter().filter(|it| !matches!(text(it, "metricType").as_str(), "none" | "segmentBy"));
            ids.extend(metrics.map(|it| text(it, "id")).filter(|id| !id.is_empty()));
            if list.len() < CATALOGUE_PAGE {
                break;
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    fn data(&self, start: u64, end: u64, filter: &str, columns: &[Value], to: usize) -> Result<Vec<DataRow>, Error> {
        let question = json!({
            "start": start,
            "end": end,
            "sampling": end.saturating_sub(start),
            "dataSourceType": "container",
            "filter": filter,
            "metrics": columns,
            "paging": { "from": 0, "to": to },
        });
        let answer: Data = self.ask("/api/data", Some(&question))?;
        match answer.data.iter().all(|row| row.d.len() == columns.len()) {
            true => Ok(answer.data),
            false => Err(invalid_answer("a row has another number of columns than asked for")),
        }
    }

    /// Cluster and object, joined by `and`. There is no escape for a quote in this language, so a
    /// value with one is refused.
    fn filter(&self, labels: &[Label<'_>]) -> Result<String, Error> {
        let cluster = (CLUSTER, self.cluster()?);
        let parts = std::iter::once(&cluster).chain(labels).map(|(id, value)| {
            if value.chars().any(|c| c.is_control() || matches!(c, '\'' | '"' | '\\')) {
                return Err(refusal!(
                    InvalidRequest,
                    "{} cannot stand in a Sysdig filter: it holds a quote or a backslash",
                    quoted(value)
                ));
            }
            Ok(format!("{id} = '{value}'"))
        });
        Ok(parts.collect::<Result<Vec<_>, _>>()?.join(" and "))
    }

    fn ask<T: for<'de> Deserialize<'de>>(&self, path: &str, question: Option<&Value>) -> Result<T, Error> {
        let token = self.token()?;
        let request = Request::builder()
            .method(if question.is_some() { Method::POST } else { Method::GET })
            .uri(format!("{}{path}", self.endpoint))
            .header("Authorization", format!("Bearer {}", token.expose()))
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(question.map(Value::to_string).unwrap_or_default());
        let sent = request.map_err(ureq::Error::from).and_then(|request| self.agent.run(request));
        let mut response = sent.map_err(|error| self.unreachable(&error))?;
        let status = response.status().as_u16();
        let retry_after = response.headers().get("Retry-After").and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        if status != 200 {
            return Err(self.refused(status, &body.unwrap_or_default(), &token).retry_after(retry_after));
        }
        let body = body.map_err(|error| match error {
            ureq::Error::Timeout(_) => self.unreachable(&error),
            other => invalid_answer(&format!("it ends early or cannot be read: {}", explain(&other))),
        })?;
        serde_json::from_slice(&body).map_err(|error| {
            let column = error.column();
            invalid_answer(&format!("it is not the JSON expected (line {}, column {column})", error.line()))
        })
    }

    fn token(&self) -> Result<Secret, Error> {
        let missing = |why: String| {
            refusal!(
                NotConfigured,
                "{why}: kubectl create secret generic --from-literal access-key=TOKEN -n custom-metrics sysdig-api \
                     (the token is in Sysdig Monitor under Settings, User Profile)"
            )
        };
        match &self.token {
            TokenSource::Given(token) => Ok(token.clone()),
            TokenSource::Missing => Err(missing("there is no Sysdig API token".to_owned())),
            TokenSource::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    missing(format!("the Sysdig API token cannot be read, {}: {error}", path.display()))
                })?;
                Secret::new(text.trim()).ok_or_else(|| missing(format!("{} holds no Sysdig API token", path.display())))
            }
        }
    }

    fn cluster(&self) -> Result<&str, Error> {
        self.cluster.as_deref().ok_or_else(|| {
            refusal!(
                NotConfigured,
                "CLUSTER_NAME is not set: kubectl set env deployment/custom-metrics-apiserver -n custom-metrics \
                 CLUSTER_NAME=NAME, with the cluster's name as Sysdig Monitor shows it"
            )
        })
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        let host = &self.endpoint;
        match error {
            ureq::Error::Timeout(_) => {
                refusal!(BackendTimeout, "Sysdig at {host} did not answer within SDC_TIMEOUT")
            }
            ureq::Error::Protocol(_) => invalid_answer("it is not HTTP"),
            other => refusal!(
                BackendUnreachable,
                "Sysdig at {host} cannot be reached: {} (check SDC_ENDPOINT, DNS and egress)",
                explain(other)
            ),
        }
    }

    fn refused(&self, status: u16, body: &[u8], token: &Secret) -> Error {
        let remark = remark(body).replace(token.expose(), "(hidden)");
        let says = format!("({status}: {})", quoted(&remark));
        let (reason, message) = match status {
            401 => (
                Reason::BackendUnauthorized,
                "does not accept the API token: renew Secret sysdig-api, the token may have expired",
            ),
            403 => (Reason::BackendForbidden, "does not let this API token read metrics: check its team and role"),
            429 => (Reason::BackendRateLimited, "limits the rate of this account's queries"),
            400..=499 => (Reason::BackendRejected, "rejects the query"),
            300..=399 => (Reason::BackendRejected, "redirects elsewhere, which is not followed: check SDC_ENDPOINT"),
            _ => (Reason::BackendError, "fails"),
        };
        Error::new(reason, format!("Sysdig {message} {says}"))
    }
}

/// The end of the newest window whose samples can all have arrived: the last step is left out.
fn window_end(now: u64) -> u64 {
    now.saturating_sub(STEP) / STEP * STEP
}

fn column(metric: &str, group: &str) -> Value {
    json!({ "id": metric, "aggregations": { "time": "avg", "group": group } })
}

fn invalid_answer(why: &str) -> Error {
    refusal!(BackendInvalidAnswer, "Sysdig's answer cannot be used: {why}")
}

/// What Sysdig says about an error, in whichever of its forms.
fn remark(body: &[u8]) -> String {
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return String::from_utf8_lossy(body.get(..400).unwrap_or(body)).into_owned();
    };
    let pointers = ["/errors/0/message", "/errors/0/reason", "/message", "/error", "/details/0"];
    let found = pointers.iter().find_map(|pointer| value.pointer(pointer).and_then(Value::as_str));
    found.map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysdig(cluster: &str) -> Sysdig {
        let variables = [("CLUSTER_NAME", cluster), ("SDC_TOKEN", "a-token")];
        let config =
            Config::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned())));
        Sysdig::new(&config.unwrap()).unwrap()
    }

    #[test]
    fn a_filter_names_cluster_and_object() {
        let sysdig = sysdig("blue");
        let labels = [("kubernetes.namespace.name", "default"), ("kubernetes.service.name", "kuard")];
        let filter = "kubernetes.cluster.name = 'blue' and kubernetes.namespace.name = 'default' and \
                      kubernetes.service.name = 'kuard'";
        assert_eq!(sysdig.filter(&labels).unwrap(), filter);
        for value in ["a'b", "a\"b", "a\\b", "a\nb"] {
            assert_eq!(sysdig.filter(&[("l", value)]).unwrap_err().reason, Reason::InvalidRequest, "{value}");
        }
    }

    #[test]
    fn a_window_is_made_of_finished_steps() {
        for (now, end) in [(1000, 990), (1001, 990), (1009, 990), (1010, 1000), (5, 0)] {
            assert_eq!(window_end(now), end, "{now}");
        }
    }

    #[test]
    fn each_kind_of_refusal_has_its_reason_and_hides_the_token() {
        let sysdig = sysdig("blue");
        let token = Secret::new("a-token").unwrap();
        let table = [
            (
                401,
                r#"{"timestamp":1,"status":401,"error":"Unauthorized a-token","path":"/"}"#,
                Reason::BackendUnauthorized,
            ),
            (403, r#"{"errors":[{"reason":"r","message":"Access is denied"}]}"#, Reason::BackendForbidden),
            (429, r#"{"type":"t","message":"slow down","details":[]}"#, Reason::BackendRateLimited),
            (400, r#"{"errors":[{"reason":"Metric not found"}]}"#, Reason::BackendRejected),
            (422, "[]", Reason::BackendRejected),
            (302, "", Reason::BackendRejected),
            (500, "<html>", Reason::BackendError),
            (504, "\u{0}\u{1b}", Reason::BackendError),
        ];
        for (status, body, reason) in table {
            let error = sysdig.refused(status, body.as_bytes(), &token);
            assert_eq!(error.reason, reason, "{status}");
            assert!(!error.message.contains("a-token"), "{}", error.message);
            assert!(!error.message.chars().any(char::is_control), "{}", error.message);
        }
    }

    #[test]
    fn what_sysdig_says_is_found_in_all_its_forms() {
        let table = [
            (r#"{"errors":[{"reason":"r","message":"m"}]}"#, "m"),
            (r#"{"errors":[{"reason":"r"}]}"#, "r"),
            (r#"{"message":"m"}"#, "m"),
            (r#"{"status":401,"error":"Unauthorized"}"#, "Unauthorized"),
            (r#"{"details":["d"]}"#, "d"),
            (r#"{"x":1}"#, r#"{"x":1}"#),
            ("Bad gateway", "Bad gateway"),
        ];
        for (body, said) in table {
            assert_eq!(remark(body.as_bytes()), said);
        }
    }
}
