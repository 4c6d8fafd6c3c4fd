//! Rows for a question, from the samples of a world.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::question::{Aggregation, Metric, Question};
use super::world::{Container, STEP, World};

/// The body of the answer; `shift` seconds are added to the time of every row.
pub fn answer(question: &Question, world: &World, shift: i64) -> Value {
    let steps = (question.end - question.start) / question.sampling.max(1);
    // Read once, or a step that ends meanwhile would show in some rows only.
    let newest = world.newest();
    let ends = (1..=steps).map(|step| question.start + step * question.sampling);
    let rows: Vec<Value> = ends
        .flat_map(|end| {
            let (from, to) = question.paging;
            let page = rows(question, world, end, newest).into_iter().skip(from).take(to - from + 1);
            page.map(move |row| json!({ "t": end + shift, "d": row.cells() })).collect::<Vec<_>>()
        })
        .collect();
    json!({ "data": rows, "start": question.start, "end": question.end })
}

#[derive(Debug)]
struct Row {
    labels: Vec<Option<String>>,
    numbers: Vec<Option<f64>>,
}

impl Row {
    fn cells(&self) -> Vec<Value> {
        let labels = self.labels.iter().map(|label| json!(label));
        labels.chain(self.numbers.iter().map(|number| json!(number))).collect()
    }
}

fn rows(question: &Question, world: &World, end: i64, newest: i64) -> Vec<Row> {
    let start = end - question.sampling;
    let mut groups: BTreeMap<Vec<Option<String>>, Vec<Vec<Option<f64>>>> = BTreeMap::new();
    for container in &world.containers {
        if question.filter.as_ref().is_some_and(|filter| !filter.matches(container)) {
            continue;
        }
        let over_time = |metric: &Metric| over_time(container, metric, start, end, newest);
        let numbers: Vec<Option<f64>> = question.metrics.iter().map(over_time).collect();
        let has_sample = match question.metrics.is_empty() {
            true => container.metrics.values().any(|series| series.samples(start, end.min(newest)).is_some()),
            false => numbers.iter().any(Option::is_some),
        };
        if has_sample {
            let labels = question.labels.iter().map(|id| container.label(id).map(str::to_owned)).collect();
            groups.entry(labels).or_default().push(numbers);
        }
    }
    let mut rows: Vec<Row> =
        groups.into_iter().map(|(labels, members)| Row { labels, numbers: over_group(&question.metrics, &members) }).collect();
    rows.sort_by(|a, b| order(question, a, b));
    rows
}

fn over_time(container: &Container, metric: &Metric, start: i64, end: i64, newest: i64) -> Option<f64> {
    let (value, count) = container.metrics.get(&metric.id)?.samples(start, end.min(newest))?;
    let expected = ((end - start) / STEP).max(1);
    Some(match metric.time {
        // A series has one value, so these are the same.
        Aggregation::Avg | Aggregation::Max | Aggregation::Min => value,
        Aggregation::Sum => value * count as f64,
        Aggregation::TimeAvg => value * count as f64 / expected as f64,
    })
}

fn over_group(metrics: &[Metric], members: &[Vec<Option<f64>>]) -> Vec<Option<f64>> {
    let columns = metrics.iter().enumerate();
    columns
        .map(|(column, metric)| {
            let numbers: Vec<f64> = members.iter().filter_map(|member| member[column]).collect();
            let sum: f64 = numbers.iter().sum();
            match metric.group {
                _ if numbers.is_empty() => None,
                Aggregation::Avg | Aggregation::TimeAvg => Some(sum / numbers.len() as f64),
                Aggregation::Max => numbers.into_iter().reduce(f64::max),
                Aggregation::Min => numbers.into_iter().reduce(f64::min),
                Aggregation::Sum => Some(sum),
            }
        })
        .collect()
}

/// By the first metric descending, by the first label descending without metrics.
fn order(question: &Question, a: &Row, b: &Row) -> Ordering {
    let Some(first) = question.metrics.first() else { return b.labels.first().cmp(&a.labels.first()) };
    let (a, b) = (a.numbers[0], b.numbers[0]);
    let ascending = a.partial_cmp(&b).unwrap_or(Ordering::Equal);
    if first.group == Aggregation::Min { ascending } else { ascending.reverse() }
}
