//! A body of `POST /api/data`, judged as strictly as the documentation allows.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::filter::Filter;
use super::world::{STEP, World};

const FIELDS: [&str; 8] = ["dataSourceType", "end", "filter", "last", "metrics", "paging", "sampling", "start"];
const SAMPLINGS: [i64; 6] = [1, 10, 60, 600, 3600, 86_400];
const MOST_POINTS: i64 = 600;
const MOST_ROWS: u64 = 1000;
const DEFAULT_LAST_ROW: u64 = 9;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Question {
    /// Unix seconds; samples at this time are not part of the window.
    pub start: i64,
    pub end: i64,
    pub sampling: i64,
    pub filter: Option<Filter>,
    pub labels: Vec<String>,
    pub metrics: Vec<Metric>,
    /// Rows from and to, both included.
    pub paging: (usize, usize),
}

/// A metric and how its samples become one number.
#[derive(Clone, Debug)]
pub struct Metric {
    pub id: String,
    pub time: Aggregation,
    pub group: Aggregation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregation {
    Avg,
    Max,
    Min,
    Sum,
    /// Divides by the number of samples that should be there.
    TimeAvg,
}

/// Why a question is refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub status: u16,
    pub body: Value,
}

impl Refusal {
    pub fn new(status: u16, reason: &str, message: impl Into<String>, field: &str, rejected: &Value) -> Self {
        let error = json!({ "reason": reason, "message": message.into(), "field": field, "rejectedValue": rejected });
        Self { status, body: json!({ "errors": [error] }) }
    }
}

impl Question {
    pub fn parse(body: &[u8], world: &World) -> Result<Self, Refusal> {
        let Ok(Value::Object(fields)) = serde_json::from_slice(body) else {
            return Err(Refusal::new(400, "Invalid request", "the body is not a JSON object", "", &Value::Null));
        };
        if let Some(field) = fields.keys().find(|field| !FIELDS.contains(&field.as_str())) {
            return Err(Refusal::new(400, "Unrecognized field", format!("'{field}' is not known"), field, &Value::Null));
        }
        if !matches!(fields.get("dataSourceType").map(Value::as_str), None | Some(Some("container" | "host"))) {
            return Err(invalid(&fields, "dataSourceType", "neither host nor container"));
        }
        let (start, end, sampling) = window(&fields, world.now())?;
        let (labels, metrics) = columns(&fields, world)?;
        let filter = match fields.get("filter") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(
                Filter::parse(text, world)
                    .map_err(|mistake| Refusal::new(400, "Invalid filter", mistake, "filter", &json!(text)))?,
            ),
            Some(_) => return Err(invalid(&fields, "filter", "neither a string nor null")),
        };
        Ok(Self { start, end, sampling, filter, labels, metrics, paging: paging(&fields)? })
    }
}

impl Aggregation {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "avg" => Some(Self::Avg),
            "max" => Some(Self::Max),
            "min" => Some(Self::Min),
            "sum" => Some(Self::Sum),
            "timeAvg" => Some(Self::TimeAvg),
            _ => None,
        }
    }
}

fn window(fields: &Map<String, Value>, now: i64) -> Result<(i64, i64, i64), Refusal> {
    let number = |field: &str| match fields.get(field) {
        None => Ok(None),
        Some(value) => match value.as_i64() {
            Some(number) if number >= 0 => Ok(Some(number)),
            _ => Err(invalid(fields, field, "not a number of whole seconds")),
        },
    };
    let (start, end) = match (number("last")?, number("start")?, number("end")?) {
        (Some(0), None, None) => return Err(invalid(fields, "last", "an empty window")),
        (Some(last), None, None) => (floor(now) - last, floor(now)),
        (None, Some(start), Some(end)) if start >= end => {
            return Err(invalid(fields, "start", "start is not before end"));
        }
        (None, Some(start), Some(end)) => (start, end),
        _ => return Err(invalid(fields, "last", "either last or both of start and end are needed")),
    };
    let window = end - start;
    let sampling = number("sampling")?.unwrap_or(window);
    if sampling != window && !SAMPLINGS.contains(&sampling) {
        return Err(invalid(fields, "sampling", "not a sampling of this plan, nor the whole window"));
    }
    if fields.contains_key("sampling") && window % STEP != 0 {
        return Err(invalid(fields, "sampling", "the window is not a multiple of 10 seconds"));
    }
    if sampling > window {
        return Err(invalid(fields, "sampling", "longer than the window"));
    }
    if window / sampling > MOST_POINTS {
        return Err(invalid(fields, "sampling", "more than 600 points"));
    }
    Ok((floor(start), floor(end), sampling))
}

fn columns(fields: &Map<String, Value>, world: &World) -> Result<(Vec<String>, Vec<Metric>), Refusal> {
    let Some(columns) = fields.get("metrics").and_then(Value::as_array).filter(|columns| !columns.is_empty()) else {
        return Err(invalid(fields, "metrics", "not a list with at least one entry"));
    };
    let (mut labels, mut metrics, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for column in columns {
        let refuse =
            |reason: &str, message: &str| Err(Refusal::new(422, reason, message.to_owned(), "metrics", &json!([column])));
        let Some(id) = column["id"].as_str() else { return refuse("Invalid metric", "an entry has no id") };
        let known = |key: &String| key == "id" || key == "aggregations";
        if !column.as_object().is_some_and(|entry| entry.keys().all(known)) {
            return refuse("Invalid metric", "an entry has a field that is neither id nor aggregations");
        }
        if !seen.insert(id) {
            return refuse("Duplicate metric", &format!("'{id}' is there twice"));
        }
        let aggregations = column.get("aggregations");
        if world.is_label(id) {
            if aggregations.is_some() {
                return refuse("Invalid aggregation", &format!("'{id}' is a label, which cannot be aggregated"));
            }
            if !metrics.is_empty() {
                return refuse("Invalid metric", "labels come before metrics");
            }
            labels.push(id.to_owned());
        } else if world.is_metric(id) {
            let Some((time, group)) = aggregation_pair(aggregations) else {
                return refuse("Invalid aggregation", &format!("the aggregations of '{id}' are not known"));
            };
            metrics.push(Metric { id: id.to_owned(), time, group });
        } else {
            return refuse("Metric not found", &format!("'{id}' is not a known metric"));
        }
    }
    Ok((labels, metrics))
}

/// Time and group aggregation; either may be left out, and is then the average.
fn aggregation_pair(given: Option<&Value>) -> Option<(Aggregation, Aggregation)> {
    let (mut time, mut group) = (Aggregation::Avg, Aggregation::Avg);
    for (key, word) in given?.as_object()? {
        let aggregation = Aggregation::parse(word.as_str()?)?;
        match (key.as_str(), aggregation) {
            ("time", _) => time = aggregation,
            ("group", Aggregation::TimeAvg) => return None,
            ("group", _) => group = aggregation,
            _ => return None,
        }
    }
    Some((time, group))
}

fn paging(fields: &Map<String, Value>) -> Result<(usize, usize), Refusal> {
    let Some(paging) = fields.get("paging") else { return Ok((0, DEFAULT_LAST_ROW as usize)) };
    let (Some(from), Some(to), Some(2)) = (paging["from"].as_u64(), paging["to"].as_u64(), paging.as_object().map(Map::len))
    else {
        return Err(invalid(fields, "paging", "not an object of the numbers from and to"));
    };
    if from > to || to - from >= MOST_ROWS {
        return Err(invalid(fields, "paging", "from is after to, or more than 1000 rows"));
    }
    Ok((from as usize, to as usize))
}

fn invalid(fields: &Map<String, Value>, field: &str, message: &str) -> Refusal {
    let rejected = fields.get(field).unwrap_or(&Value::Null);
    Refusal::new(422, "Invalid value", format!("{field}: {message}"), field, rejected)
}

fn floor(unix: i64) -> i64 {
    unix.div_euclid(STEP) * STEP
}
