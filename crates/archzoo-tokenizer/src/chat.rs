use minijinja::{Environment, ErrorKind, Value};

use crate::error::{Error, Result};

/// Fills in a chat template, as `transformers` does, with the variables of a JSON object.
pub fn render(template: &str, variables: &str) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    let variables: Value = serde_json::from_str(variables)
        .map_err(|e| Error::new(format!("variables of a chat template: {e}")))?;
    environment
        .render_str(template, variables)
        .map_err(|e| Error::new(format!("chat template: {}", e.detail().unwrap_or(&e.to_string()))))
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn chatml() {
        let template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content.strip() }}{% endfor %}\n{%- if add_generation_prompt %}\n!{% endif %}";
        let variables =
            r#"{"messages": [{"role": "user", "content": " Hi "}], "add_generation_prompt": true}"#;
        assert_eq!(render(template, variables).unwrap(), "<|im_start|>user\nHi!");
        let error = render("{{ raise_exception('no system line') }}", "{}").unwrap_err();
        assert!(error.to_string().contains("no system line"));
    }
}
