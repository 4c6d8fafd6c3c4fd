//! Questions to Sysdig's Data API.
//! Source: <https://docs.sysdig.com/en/docs/developer-tools/working-with-the-data-api/>.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, quoted, refusal};
use crate::kube::MOST_OBJECTS;
use crate::promql::label_name;
use crate::quantity::Quantity;
use crate::route::Resource;
use crate::selector::{Requirement, Tuning};
use crate::sysdig::{JSON, Question, Row, Sysdig, invalid_answer};

/// Every container has it: where it has a value, silence of another metric means idleness.
const COMPANION: &str = "container.count";
const CLUSTER: &str = "kubernetes.cluster.name";
/// Labels beside those of resources that have another form in PromQL.
const LABELS: [&str; 5] = [CLUSTER, "container.name", "net.http.method", "net.http.statusCode", "net.http.url"];
const PAGE: usize = MOST_OBJECTS;
const CATALOGUE_PAGES: usize = 20;

#[derive(Deserialize)]
struct Data {
    data: Vec<DataRow>,
}

#[derive(Deserialize)]
struct DataRow {
    t: u64,
    d: Vec<Value>,
}

pub(crate) fn rows(sysdig: &Sysdig, question: &Question<'_>, end: u64) -> Result<Vec<Row>, Error> {
    let Question { metric, tuning: Tuning { time, group, window }, by, scope, host, .. } = question;
    let place = Resource::NAMESPACES.label;
    let namespace = scope.iter().filter(|it| it.key == place && *by != Some(place)).find_map(|it| it.values.first());
    let labels: Vec<&str> = namespace.map(|_| place).into_iter().chain(*by).collect();
    let mut columns: Vec<Value> = labels.iter().map(|id| json!({ "id": id })).collect();
    columns.push(column(metric, time, group));
    if *metric != COMPANION && !host {
        columns.push(column(COMPANION, "avg", "sum"));
    }
    let mut rows = Vec::new();
    for DataRow { t, d } in ask(sysdig, *host, [end.saturating_sub(*window), end], &question.requirements(), &columns)?
    {
        let mut cells = d.into_iter();
        if namespace.is_some_and(|namespace| cells.next().is_none_or(|cell| cell != **namespace)) {
            return Err(invalid_answer("it is about another namespace than asked for"));
        }
        let asked =
            |cell: &Value| scope.iter().any(|it| Some(it.key.as_str()) == *by && it.values.iter().any(|v| cell == v));
        let Some(Value::String(object)) = cells.next().filter(asked) else {
            return Err(invalid_answer("it is about another object than asked for"));
        };
        let value = match cells.next().unwrap_or_default() {
            Value::Null => None,
            Value::Number(number) => Some(Quantity::parse(&number.to_string())),
            _ => return Err(invalid_answer("a metric's value is no number")),
        };
        rows.push(Row { object, end: t, value, pods: None });
    }
    Ok(rows)
}

pub(crate) fn pods(sysdig: &Sysdig, question: &Question<'_>, end: u64) -> Result<u64, Error> {
    let columns = [json!({ "id": Resource::PODS.label }), column(COMPANION, "avg", "avg")];
    let start = end.saturating_sub(question.tuning.window);
    let rows = ask(sysdig, false, [start, end], &question.scope, &columns)?;
    Ok(rows.iter().filter(|row| row.d.iter().all(|cell| !cell.is_null())).count() as u64)
}

pub(crate) fn is_collected(sysdig: &Sysdig, question: &Question<'_>, end: u64) -> Result<bool, Error> {
    let day = [end.saturating_sub(86_400), end];
    let rows = ask(sysdig, question.host, day, &[], &[column(question.metric, "avg", "avg")])?;
    Ok(rows.iter().any(|row| row.d.iter().any(|cell| !cell.is_null())))
}

pub(crate) fn catalogue(sysdig: &Sysdig) -> Result<Vec<String>, Error> {
    let mut ids = Vec::new();
    for page in 0..CATALOGUE_PAGES {
        let path = format!("/api/v2/metrics/descriptors?limit={PAGE}&offset={}", page * PAGE);
        let found: Value = sysdig.ask(&path, None)?;
        let list = found.pointer("/metricDescriptors").and_then(Value::as_array);
        let list = list.ok_or_else(|| invalid_answer("metricDescriptors is missing"))?;
        let metrics = list.iter().filter(|it| it["metricType"] != "none" && it["metricType"] != "segmentBy");
        ids.extend(metrics.filter_map(|it| it["id"].as_str()).filter(|id| !id.is_empty()).map(str::to_owned));
        if list.len() < PAGE {
            break;
        }
    }
    Ok(ids)
}

type Rows = Result<Vec<DataRow>, Error>;

fn ask(sysdig: &Sysdig, host: bool, [start, end]: [u64; 2], within: &[Requirement], columns: &[Value]) -> Rows {
    let body = json!({
        "start": start, "end": end, "sampling": end.saturating_sub(start), "metrics": columns,
        "filter": filter(sysdig.cluster()?, within)?, "paging": { "from": 0, "to": PAGE - 1 },
        "dataSourceType": if host { "host" } else { "container" },
    });
    let Data { data } = sysdig.ask("/api/data", Some((JSON, body.to_string())))?;
    let whole = data.iter().all(|row| row.d.len() == columns.len());
    if whole { Ok(data) } else { Err(invalid_answer("a row has another number of columns than asked for")) }
}

fn column(metric: &str, time: &str, group: &str) -> Value {
    json!({ "id": metric, "aggregations": { "time": time, "group": group } })
}

/// Cluster and requirements, joined by `and`. There is no escape for a quote in this language, so a
/// value with one is refused.
fn filter(cluster: &str, requirements: &[Requirement]) -> Result<String, Error> {
    let cluster = Requirement { key: CLUSTER.to_owned(), values: vec![cluster.to_owned()] };
    let parts = std::iter::once(&cluster).chain(requirements).map(|Requirement { key, values }| {
        if let Some(value) = values.iter().find(|it| it.contains(|c: char| c.is_control() || "'\"\\".contains(c))) {
            let mistake = "cannot stand in a Sysdig filter: it holds a quote or a backslash";
            return Err(refusal!(InvalidRequest, "{} {mistake}", quoted(value)));
        }
        let mut known = Resource::ALL.iter().map(|it| it.label).chain(LABELS);
        let id = known.find(|label| label_name(label) == *key).unwrap_or(key);
        let list = values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ");
        Ok(if values.len() == 1 { format!("{id} = {list}") } else { format!("{id} in ({list})") })
    });
    Ok(parts.collect::<Result<Vec<_>, _>>()?.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    fn requirement(key: &str, values: &[&str]) -> Requirement {
        Requirement { key: key.to_owned(), values: values.iter().map(|value| (*value).to_owned()).collect() }
    }

    #[test]
    fn a_filter_names_cluster_and_object_in_the_old_form() {
        let table = [
            (vec![], "kubernetes.cluster.name = 'blue'"),
            (
                vec![
                    requirement("kubernetes.namespace.name", &["shop"]),
                    requirement("kubernetes.pod.name", &["a", "b"]),
                ],
                "kubernetes.cluster.name = 'blue' and kubernetes.namespace.name = 'shop' and \
                 kubernetes.pod.name in ('a', 'b')",
            ),
            (
                vec![requirement("kube_statefulset_name", &["db"]), requirement("net.http.method", &["GET"])],
                "kubernetes.cluster.name = 'blue' and kubernetes.statefulSet.name = 'db' and net.http.method = 'GET'",
            ),
        ];
        for (requirements, expected) in table {
            assert_eq!(filter("blue", &requirements).unwrap(), expected);
        }
        for value in ["a'b", "a\"b", "a\\b", "a\nb"] {
            assert_eq!(filter("blue", &[requirement("l", &[value])]).unwrap_err().reason, Reason::InvalidRequest);
            assert_eq!(filter(value, &[]).unwrap_err().reason, Reason::InvalidRequest, "{value}");
        }
    }
}
