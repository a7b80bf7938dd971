//! Types for the values of formats that have none, and batches of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use arrow_json::ReaderBuilder;
use arrow_json::reader::Decoder;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::{BATCH, Wanted};
use crate::CrawlError;

/// What stands for no value in CSV, beside nothing at all.
const NULLS: [&str; 8] = ["NA", "N/A", "#N/A", "NULL", "null", "NaN", "nan", "None"];

/// What is learnt of the types of columns, value by value.
pub(super) struct Types {
    types: Vec<DataType>,
    /// Columns in which a value was seen.
    seen: Vec<bool>,
    /// Whether values have types of their own; CSV cells are texts that may look like something.
    typed: bool,
}

impl Types {
    pub(super) fn new(wanted: &[Wanted], typed: bool) -> Self {
        let types = wanted.iter().map(|w| if w.text { DataType::Utf8 } else { DataType::Null });
        Self { types: types.collect(), seen: vec![false; wanted.len()], typed }
    }

    pub(super) fn see(&mut self, row: &[Value]) {
        for ((known, seen), value) in self.types.iter_mut().zip(&mut self.seen).zip(row) {
            *seen |= !value.is_null();
            if *known != DataType::Utf8 {
                let kind = match value {
                    Value::String(text) if !self.typed => looks_like(text),
                    value => type_of(value),
                };
                *known = both(known, &kind);
            }
        }
    }

    /// A column in which no row had a value: objects do not tell their columns beforehand.
    pub(super) fn without_value(&self) -> Option<usize> {
        self.seen.iter().position(|seen| !seen)
    }

    /// Columns without any value are text.
    pub(super) fn schema(&self, wanted: &[Wanted]) -> SchemaRef {
        let fields = wanted.iter().zip(&self.types).map(|(w, kind)| Field::new(&w.name, settled(kind), true));
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }
}

/// The type that a CSV cell could have.
fn looks_like(cell: &str) -> DataType {
    let number = || cell.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    if cell.is_empty() || NULLS.contains(&cell) {
        DataType::Null
    } else if cell.parse::<i64>().is_ok() {
        DataType::Int64
    } else if number() && cell.contains(['.', 'e', 'E']) && cell.parse::<f64>().is_ok() {
        DataType::Float64
    } else if cell.eq_ignore_ascii_case("true") || cell.eq_ignore_ascii_case("false") {
        DataType::Boolean
    } else {
        DataType::Utf8
    }
}

fn type_of(value: &Value) -> DataType {
    match value {
        Value::Null => DataType::Null,
        Value::Bool(_) => DataType::Boolean,
        Value::Number(n) if n.is_i64() => DataType::Int64,
        // A number that neither type holds exactly is kept as its digits.
        Value::Number(n) if n.is_u64() => DataType::Utf8,
        Value::Number(_) => DataType::Float64,
        Value::String(_) => DataType::Utf8,
        Value::Array(items) => {
            let item = items.iter().fold(DataType::Null, |known, item| both(&known, &type_of(item)));
            DataType::List(Arc::new(Field::new_list_field(item, true)))
        }
        Value::Object(object) => {
            DataType::Struct(object.iter().map(|(name, value)| Field::new(name, type_of(value), true)).collect())
        }
    }
}

/// The type that holds the values of both; text, if there is no other.
fn both(a: &DataType, b: &DataType) -> DataType {
    use DataType::{Float64, Int64, List, Null, Struct, Utf8};
    match (a, b) {
        (a, b) if a == b => a.clone(),
        (Null, other) | (other, Null) => other.clone(),
        (Int64, Float64) | (Float64, Int64) => Float64,
        (List(a), List(b)) => List(Arc::new(Field::new_list_field(both(a.data_type(), b.data_type()), true))),
        (Struct(a), Struct(b)) => {
            let mut fields: Vec<Field> = a.iter().map(|f| f.as_ref().clone()).collect();
            for field in b {
                match fields.iter_mut().find(|f| f.name() == field.name()) {
                    Some(known) => known.set_data_type(both(known.data_type(), field.data_type())),
                    None => fields.push(field.as_ref().clone()),
                }
            }
            Struct(fields.into())
        }
        _ => Utf8,
    }
}

/// The type without unknown parts.
fn settled(kind: &DataType) -> DataType {
    let field = |f: &Field| Field::new(f.name(), settled(f.data_type()), true);
    match kind {
        DataType::Null => DataType::Utf8,
        DataType::List(item) => DataType::List(Arc::new(field(item))),
        // A struct without fields has no column in Parquet.
        DataType::Struct(fields) if fields.is_empty() => DataType::Utf8,
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(|f| field(f)).collect::<Fields>()),
        other => other.clone(),
    }
}

/// The value, such that the decoder takes it for one of this type.
fn fitted(value: Value, kind: &DataType, typed: bool) -> Value {
    match (kind, value) {
        (_, Value::Null) => Value::Null,
        (DataType::Utf8, Value::String(text)) => Value::String(text),
        (DataType::Utf8, other) => Value::String(other.to_string()),
        (kind, Value::String(cell)) if !typed => match kind {
            DataType::Int64 => cell.parse::<i64>().map_or(Value::Null, Value::from),
            DataType::Float64 => cell.parse::<f64>().map_or(Value::Null, Value::from),
            DataType::Boolean if looks_like(&cell) == DataType::Boolean => Value::Bool(cell.eq_ignore_ascii_case("true")),
            _ => Value::Null,
        },
        (DataType::List(item), Value::Array(items)) => {
            items.into_iter().map(|value| fitted(value, item.data_type(), typed)).collect()
        }
        (DataType::Struct(fields), Value::Object(mut object)) => {
            let value =
                |f: &Arc<Field>| (f.name().clone(), fitted(object.remove(f.name()).unwrap_or_default(), f.data_type(), typed));
            Value::Object(fields.iter().map(value).collect())
        }
        (_, value) => value,
    }
}

/// Rows on their way into a batch.
pub(super) struct Batches {
    schema: SchemaRef,
    decoder: Decoder,
    rows: Vec<Vec<Value>>,
    typed: bool,
    path: PathBuf,
}

/// A row as the decoder reads it.
struct Row<'a>(&'a Schema, &'a [Value]);

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(self.1.len()))?;
        for (field, value) in self.0.fields().iter().zip(self.1) {
            map.serialize_entry(field.name(), value)?;
        }
        map.end()
    }
}

impl Batches {
    pub(super) fn new(schema: &SchemaRef, typed: bool, path: &Path) -> Result<Self, CrawlError> {
        let decoder = ReaderBuilder::new(Arc::clone(schema)).with_batch_size(BATCH).build_decoder();
        let decoder = decoder.map_err(|e| CrawlError::format(path, e.to_string()))?;
        Ok(Self { schema: Arc::clone(schema), decoder, rows: Vec::new(), typed, path: path.to_owned() })
    }

    pub(super) fn push(&mut self, row: Vec<Value>) {
        let fields = self.schema.fields().iter();
        self.rows.push(row.into_iter().zip(fields).map(|(value, f)| fitted(value, f.data_type(), self.typed)).collect());
    }

    pub(super) const fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows since the last time, at most [`BATCH`].
    pub(super) fn take(&mut self) -> Result<RecordBatch, CrawlError> {
        let rows: Vec<Row<'_>> = self.rows.iter().map(|values| Row(&self.schema, values)).collect();
        let batch = self.decoder.serialize(&rows).and_then(|()| self.decoder.flush());
        let batch = batch.map_err(|e| CrawlError::format(&self.path, format!("it has changed while it was read ({e})")))?;
        self.rows.clear();
        Ok(batch.unwrap_or_else(|| RecordBatch::new_empty(Arc::clone(&self.schema))))
    }
}
