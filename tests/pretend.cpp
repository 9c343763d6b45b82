// A device that is the CPU under another name: tensors of their own kind in host memory, every operation the CPU's.
// What a GPU would refuse it refuses (tensors or a generator of two devices in one operation), and what the host would
// wait for there it counts (a value that is read, a copy from or to the host that does not say non_blocking).
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
std::atomic<long> n_waits{0};

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t n) override {
        void* data = n ? std::malloc(n) : nullptr;
        return {data, data, &std::free, c10::Device(KIND, 0)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
    void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

// One device with one stream, where everything has happened already.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
    c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
    c10::Device getDevice() const override { return {KIND, 0}; }
    c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(KIND, 0)); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(KIND, 0)); }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// A generator of this device; the numbers are those of the CPU's with the same seed.
struct Draws final : c10::GeneratorImpl {
    at::Generator cpu = at::detail::createCPUGenerator();
    Draws() : c10::GeneratorImpl(c10::Device(KIND, 0), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
    void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
    uint64_t get_offset() const override { return cpu.get_offset(); }
    uint64_t current_seed() const override { return cpu.current_seed(); }
    uint64_t seed() override { return cpu.seed(); }
    void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
    Draws* clone_impl() const override { throw std::runtime_error("no clones"); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Draws>(); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
        auto fresh = memory.allocate(n);
        std::memcpy(fresh.get(), storage.data(), std::min(n, storage.nbytes()));
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
        storage.unsafeGetStorageImpl()->set_nbytes(n);
    }
};

bool ours(const at::Tensor& t) { return t.defined() && t.device().type() == KIND; }

// The same memory as a tensor of the CPU.
at::Tensor cpu(const at::Tensor& t) {
    return ours(t) ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU)) : t;
}

at::Tensor fresh_like(const at::Tensor& t) {
    const at::Tensor made = at::detail::empty_strided_generic(
        t.sizes(), t.strides(), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.scalar_type());
    cpu(made).copy_(t);
    return made;
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const auto n = schema.arguments().size(), first = stack->size() - n;
    std::vector<c10::IValue> given(stack->begin() + first, stack->end());
    const std::string name = schema.operator_name().name;
    const bool may_index = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;
    auto moved = [&](const at::Tensor& t, bool index) {
        TORCH_CHECK(!t.defined() || ours(t) || t.dim() == 0 || (index && may_index),
                    name, ": a tensor of the CPU, ", t.sizes(), " ", t.scalar_type(), ", among tensors of the device");
        return cpu(t);
    };
    for (size_t i = 0; i < n; ++i) {
        auto& value = (*stack)[first + i];
        if (value.isTensor()) {
            const auto& t = value.toTensor();
            const auto* alias = schema.arguments()[i].alias_info();
            value = alias && alias->isWrite() && ours(t) && t.numel() == 0 ? at::empty({0}, t.options().device(at::kCPU)) : moved(t, false);
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor t : value.toTensorList()) list.push_back(moved(t, false));
            value = list;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> list;
            for (std::optional<at::Tensor> t : value.toOptionalTensorList())
                list.push_back(t ? std::optional<at::Tensor>(moved(*t, true)) : t);
            value = list;
        } else if (value.isGenerator()) {
            const auto generator = value.toGenerator();
            if (generator.defined()) {
                TORCH_CHECK(generator.device().type() == KIND, name, ": a generator of the CPU among tensors of the device");
                value = generator.get<Draws>()->cpu;
            }
        } else if (value.isDevice() && value.toDevice().type() == KIND) {
            value = c10::Device(at::kCPU);
        }
    }
    std::vector<c10::IValue> used(stack->begin() + first, stack->end());
    op.callBoxed(stack);
    for (size_t i = 0; i < n; ++i)  // outputs that were made to measure
        if (given[i].isTensor() && ours(given[i].toTensor()) && used[i].toTensor().sizes() != given[i].toTensor().sizes()) {
            const auto out = given[i].toTensor(), made = used[i].toTensor();
            out.resize_(made.sizes());
            cpu(out).copy_(made);
        }
    const auto n_out = schema.returns().size(), out = stack->size() - n_out;
    for (size_t i = 0; i < n_out; ++i) {
        auto& value = (*stack)[out + i];
        if (value.isTensor() && value.toTensor().defined()) {
            const auto* alias = schema.returns()[i].alias_info();
            bool same = false;
            for (size_t k = 0; alias && k < n && !same; ++k)
                if (given[k].isTensor() && schema.arguments()[k].alias_info() && *schema.arguments()[k].alias_info() == *alias)
                    value = given[k], same = true;
            if (!same) value = fresh_like(value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor t : value.toTensorList()) list.push_back(fresh_like(t));
            value = list;
        }
    }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
        c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    if (ours(from) != ours(to) && !(ours(to) && non_blocking)) ++n_waits;
    cpu(to).copy_(cpu(from));
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& t) {
    ++n_waits;
    return at::_local_scalar_dense(cpu(t));
}

bool equal(const at::Tensor& a, const at::Tensor& b) {
    ++n_waits;
    TORCH_CHECK(ours(a) && ours(b), "equal: tensors of two devices");
    return at::equal(cpu(a), cpu(b));
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
    const auto want = C10_AS_INTARRAYREF_SLOW(size);
    const auto n_bytes = (t.storage_offset() + c10::multiply_integers(want)) * t.element_size();
    if (n_bytes > t.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), n_bytes);
    t.unsafeGetTensorImpl()->set_sizes_contiguous(want);
    if (format) t.unsafeGetTensorImpl()->empty_tensor_restride(*format);
    return t;
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    auto* self = t.unsafeGetTensorImpl();
    self->set_storage_keep_dtype(std::move(storage));
    self->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
    self->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
    return t;
}

at::Tensor& set_whole_storage(at::Tensor& t, at::Storage storage) {
    const c10::SymInt n = static_cast<int64_t>(storage.nbytes() / t.element_size()), one = 1;
    return set_storage(t, std::move(storage), 0, c10::SymIntArrayRef(&n, 1), c10::SymIntArrayRef(&one, 1));
}

at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
        offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
                       c10::SymInt groups) {
    TORCH_CHECK(ours(x) && ours(w) && (!b || !b->defined() || ours(*b)), "convolution: tensors of two devices");
    return fresh_like(at::convolution_symint(cpu(x), cpu(w), b ? std::optional<at::Tensor>(cpu(*b)) : b, stride, padding, dilation,
                                             transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
    TORCH_CHECK(ours(dy) && ours(x) && ours(w), "convolution_backward: tensors of two devices");
    const c10::SymInt n_outputs = transposed ? w.size(1) * groups.guard_int(__FILE__, __LINE__) : w.size(0);
    auto [dx, dw, db] = at::convolution_backward_symint(cpu(dy), cpu(x), cpu(w), c10::SymIntArrayRef(&n_outputs, 1), stride, padding,
                                                        dilation, transposed, output_padding, groups, mask);
    auto made = [](const at::Tensor& t) { return t.defined() ? fresh_like(t) : t; };
    return {made(dx), made(dw), made(db)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", item);
    m.impl("equal", equal);
    m.impl("resize_", resize);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("set_.source_Storage", set_whole_storage);
    m.impl("view", view);
    m.impl("as_strided", as_strided);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("unfold", at::native::unfold);
    m.impl("convolution_overrideable", convolution);
    m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

const bool registered = [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    return true;
}();

}  // namespace

extern "C" long pretend_waits() { return n_waits; }
