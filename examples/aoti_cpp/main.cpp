// Runs an AOTInductor package without Python and compares it with saved results.
//
//   run_package model.pt2 case_0.pt case_1.pt ...
//
// A case is {"inputs": [tensors], "outputs": [tensors]}, written by torch.save. Prints the largest error of each.
// Exit code: 0 all within the tolerance, 1 not, 2 something cannot be read or run.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <ATen/ATen.h>
#include <chrono>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

constexpr double kTolerance = 1e-3;  // relative to the largest output

struct Case {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> outputs;
};

std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& entry : list.toListRef()) {
    found.push_back(entry.toTensor());
  }
  return found;
}

Case read_case(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot open " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto fields = torch::jit::pickle_load(bytes).toGenericDict();
  return {tensors(fields.at("inputs")), tensors(fields.at("outputs"))};
}

// The largest absolute difference, relative to the largest expected value; not a number where one is.
double error_of(const std::vector<at::Tensor>& actual, const std::vector<at::Tensor>& expected) {
  TORCH_CHECK(actual.size() == expected.size(), "found ", actual.size(), " outputs, expected ", expected.size());
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    TORCH_CHECK(actual[i].sizes() == expected[i].sizes(), "output ", i, " is ", actual[i].sizes(), ", expected ",
                expected[i].sizes());
    const auto wanted = expected[i].to(at::kCPU, at::kDouble);
    const auto gap = (actual[i].to(at::kCPU, at::kDouble) - wanted).abs().max().item<double>();
    const double error = gap / wanted.abs().max().item<double>();
    largest = error > largest || error != error ? error : largest;
  }
  return largest;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " model.pt2 case.pt ...\n";
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader package(argv[1]);
    const auto metadata = package.get_metadata();
    const auto inputs = metadata.find("tsa_inputs");
    std::cout << "exported for " << (inputs == metadata.end() ? "unknown inputs" : inputs->second) << "\n";
    bool close = true;
    for (int i = 2; i < argc; ++i) {
      const Case saved = read_case(argv[i]);
      const auto start = std::chrono::steady_clock::now();
      const auto outputs = package.run(saved.inputs);
      const double error = error_of(outputs, saved.outputs);  // reads the result, so the device is done
      const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
      std::cout << argv[i] << " " << saved.inputs.at(0).sizes() << " max error " << error << ", " << spent.count()
                << " ms\n";
      close = close && error < kTolerance;
    }
    return close ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
