//! The document as a JSON Schema (2020-12), made from the table that the parser goes by.

use serde_json::{Map, Value, json};

use super::{
    Policy,
    table::{DOCUMENT, Field, Shape},
};

impl Policy {
    /// What documents look like, for editors and for the API's description. It says what each field may hold; what
    /// fields may not say together is said by the parser alone.
    pub fn schema() -> Value {
        let mut schema = object(DOCUMENT, Some(&Self::default().to_value()));
        schema["title"] = json!("Egress policy");
        schema["description"] =
            json!("What a sandbox may do on the network. Every tier that has a policy must allow a flow.");
        schema
    }
}

fn object(fields: &[Field], defaults: Option<&Value>) -> Value {
    let properties = fields.iter().map(|field| {
        let default = defaults.and_then(|defaults| defaults.get(field.name));
        let default = default.filter(|_| !field.is_required);
        let mut schema = shape(&field.shape, default);
        schema["description"] = match (&field.shape, field.about) {
            (Shape::Text(_, kind), about) => json!(format!("{about} {}.", sentence(kind))),
            (_, about) => json!(about),
        };
        if let Some(default) = default {
            schema["default"] = default.clone();
        }
        (field.name.to_owned(), schema)
    });
    let required: Vec<&str> = fields
        .iter()
        .filter(|field| field.is_required)
        .map(|field| field.name)
        .collect();
    let mut schema = json!({
        "type": "object",
        "properties": properties.collect::<Map<String, Value>>(),
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn shape(shape_of: &Shape, default: Option<&Value>) -> Value {
    match shape_of {
        Shape::Word(words) => json!({"type": "string", "enum": words}),
        Shape::Text(longest, kind) => {
            json!({"type": "string", "minLength": 1, "maxLength": longest, "description": sentence(kind)})
        }
        Shape::Flag => json!({"type": "boolean", "default": false}),
        Shape::Whole(range) => json!({"type": "integer", "minimum": range.start(), "maximum": range.end()}),
        Shape::Ports => json!({"oneOf": [
            {"type": "integer", "minimum": 1, "maximum": 65_535},
            {"type": "string", "pattern": "^[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?$"},
        ]}),
        Shape::List(item, fewest, most) => {
            let mut list = json!({"type": "array", "items": shape(item, None), "maxItems": most});
            if *fewest > 0 {
                list["minItems"] = json!(fewest);
            }
            list
        }
        Shape::Object(fields) => object(fields, default),
        Shape::Anything => json!({}),
    }
}

fn sentence(kind: &str) -> String {
    let mut letters = kind.chars();
    letters
        .next()
        .map(|first| first.to_uppercase().chain(letters).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
