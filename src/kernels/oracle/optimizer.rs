//! AdamW as PyTorch computes it: decoupled decay, then a bias-corrected step.

use super::Oracle;
use crate::kernels::ops::AdamW;

pub(super) fn adamw(args: AdamW<'_, Oracle>) {
    let AdamW { params, m, v, grads, groups, grad_scale, step, beta1, beta2, eps } = args;
    let Some(grad_scale) = grad_scale.on_host(&Oracle) else { return };
    let (grad_scale, eps) = (f64::from(grad_scale), f64::from(eps));
    let correction1 = 1.0 - beta1.powf(step as f64);
    let correction2 = 1.0 - beta2.powf(step as f64);
    let (params, m, v) = (params.values_mut(), m.values_mut(), v.values_mut());
    for group in groups {
        let (lr, decay) = (f64::from(group.lr), f64::from(group.weight_decay));
        for i in group.range.clone() {
            let gradient = grad_scale * grads.buffer[i];
            m[i] = beta1 * m[i] + (1.0 - beta1) * gradient;
            v[i] = beta2 * v[i] + (1.0 - beta2) * gradient * gradient;
            let step = (m[i] / correction1) / ((v[i] / correction2).sqrt() + eps);
            params[i] = params[i] * (1.0 - lr * decay) - lr * step;
        }
    }
}
