// Classifies an image with a native model. Needs onnxruntime's C++ headers and library, 1.17 or newer, which
// https://github.com/microsoft/onnxruntime/releases has for most systems (ORT: the unpacked folder):
//
//   c++ -std=c++17 -O2 classify.cpp -I $ORT/include -L $ORT/lib -lonnxruntime -Wl,-rpath,$ORT/lib -o classify
//   qat export --onnx model.onnx --target native --input uint8 --layout NHWC
//   python -c 'from qat_export.nativelibrary import native_library_path as p; print(p())'    # the LIBRARY
//   ./classify model.onnx LIBRARY image.ppm
//
// The image is a binary PPM (P6) of the size that the model takes.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Pixels of a binary PPM in rows, columns, colors.
std::vector<uint8_t> read_ppm(const std::string& path, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t columns = 0, rows = 0, largest = 0;
  file >> magic >> columns >> rows >> largest;
  file.get();  // one white space before the pixels
  if (!file || magic != "P6" || largest != 255) throw std::runtime_error(path + ": not a PPM with 8 bits a color");
  if (columns != width || rows != height) {
    throw std::runtime_error(path + ": " + std::to_string(columns) + "×" + std::to_string(rows) + " pixels, need " +
                             std::to_string(width) + "×" + std::to_string(height));
  }
  std::vector<uint8_t> pixels(static_cast<size_t>(3 * width * height));
  file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  if (!file) throw std::runtime_error(path + ": ends too early");
  return pixels;
}

void classify(const std::string& model, const std::string& library, const std::string& image) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, model.c_str(), options);

  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4 || shape[3] != 3) throw std::runtime_error(model + ": not exported with --layout NHWC");
  shape[0] = 1;  // the batch
  std::vector<uint8_t> pixels = read_ppm(image, shape[1], shape[2]);
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value input =
      Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());

  const char *inputs[] = {"image"}, *outputs[] = {"logits"};
  const std::vector<Ort::Value> results = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs, 1);
  const size_t classes = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
  const float* logits = results[0].GetTensorData<float>();
  size_t best = 0;
  for (size_t i = 1; i < classes; ++i) best = logits[i] > logits[best] ? i : best;
  std::printf("class %zu, logit %g\n", best, static_cast<double>(logits[best]));
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 4) throw std::runtime_error("usage: classify MODEL LIBRARY IMAGE.ppm");
  classify(arguments[1], arguments[2], arguments[3]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
